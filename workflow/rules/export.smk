rule export:
    input:
        start=by_run(WIRING, WIRING.start),
        train=by_run(WIRING, WIRING.trained),
        chat_template=by_run(WIRING, WIRING.chat_template_of_run),
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
        start=by_run(WIRING, WIRING.start_arguments),
        train=by_run(WIRING, WIRING.trained_arguments),
        directory=subpath(output.manifest, parent=True),
    shell:
        "python -m dayzero.stages.export --config {params.config:q} {params.start:q} {params.train:q}"
        " --output {params.directory:q} --log {log:q}"
