rule report:
    input:
        configs=WIRING.results("config"),
        store=WIRING.results("store"),
        check=WIRING.results("check"),
        train=WIRING.results("train"),
        export=WIRING.results("export"),
        evaluate=WIRING.results("evaluate"),
        verify_serving=WIRING.results("verify_serving"),
    output:
        index=report(
            f"{REPORT}/index.html",
            caption="../report/report.rst",
            category="Report",
            labels={"file": "the whole report"},
        ),
        csv=report(
            f"{REPORT}/results.csv",
            caption="../report/results.rst",
            category="Report",
            labels={"file": "all scores"},
        ),
        tex=f"{REPORT}/results.tex",
        plots=[
            report(
                f"{REPORT}/{plot}.svg",
                caption="../report/plot.rst",
                category="Plots",
                labels={"plot": plot},
            )
            for plot in PLOTS
        ],
    log:
        f"{RESULTS}/{EXPERIMENT.name}/logs/report.log",
    conda:
        "../../envs/train.yaml"
    threads: job_threads(WIRING, "report")
    resources:
        **job_resources(WIRING, SITE, "report"),
    params:
        experiment=EXPERIMENT.name,
        description=EXPERIMENT.description,
        runs=WIRING.directories(),
        directory=subpath(output.index, parent=True),
    shell:
        "python -m dayzero.stages.report --experiment {params.experiment:q}"
        " --description={params.description:q} --runs {params.runs:q} --output {params.directory:q} --log {log:q}"
