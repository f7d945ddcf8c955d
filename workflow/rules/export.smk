rule export:
    input:
        start=lambda w: WIRING.start(w.run),
        train=lambda w: WIRING.trained(w.run),
        chat_template=lambda w: WIRING.chat_template(WIRING.run(w.run)),
    output:
        manifest=f"{RUN}/model/manifest.json",
    log:
        f"{RUN}/logs/export.log",
    conda:
        "../../envs/train.yaml"
    threads: job_threads(WIRING, "export")
    resources:
        **job_resources(WIRING, SITE, "export"),
    params:
        config=lambda w: WIRING.config(w.run, "export"),
        start=lambda w: WIRING.start_arguments(w.run),
        train=lambda w: WIRING.trained_arguments(w.run),
        directory=subpath(output.manifest, parent=True),
    shell:
        "python -m dayzero.stages.export --config {params.config:q} {params.start:q} {params.train:q}"
        " --output {params.directory:q} --log {log:q}"
