rule train:
    input:
        tokens=by_run(WIRING, WIRING.tokens_manifest),
        start=by_run(WIRING, WIRING.start),
        teacher=by_run(WIRING, WIRING.teacher),
    output:
        metrics=report(
            f"{RUN}/train/metrics.jsonl",
            caption="../report/metrics.rst",
            category="Training",
            labels={"run": "{run}", "file": "metrics"},
        ),
        summary=report(
            f"{RUN}/train/summary.json",
            caption="../report/training.rst",
            category="Training",
            labels={"run": "{run}", "file": "summary"},
        ),
    log:
        f"{RUN}/logs/train.log",
    conda:
        "../../envs/train.yaml"
    threads: job_threads(WIRING, "train")
    resources:
        **job_resources(WIRING, SITE, "train"),
        launch=launch_arguments(WIRING),  # not a parameter: it changes no result, so it reruns nothing
    params:
        config=lambda w: WIRING.config(w.run, "train"),
        start=by_run(WIRING, WIRING.start_arguments),
        teacher=by_run(WIRING, WIRING.teacher_arguments),
        tokens=subpath(input.tokens, parent=True),
        directory=subpath(output.summary, parent=True),
    shell:
        "python -m dayzero.stages.train --config {params.config:q} --tokens {params.tokens:q} {params.start:q}"
        " {params.teacher:q} --output {params.directory:q} --set-aside-other-checkpoints --log {log:q} {resources.launch}"
