from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/export.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/report.smk"


localrules:
    all,
    resolve_config,
    fetch_model,
    fetch_data,
    report,


rule all:
    default_target: True
    input:
        rules.report.input,  # so that a deleted file is missed
        rules.report.output,
