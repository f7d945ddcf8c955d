rule evaluate:
    input:
        model=f"{RUN}/model/manifest.json",
        data=by_run(WIRING, WIRING.data_manifest),
        tasks=by_run(WIRING, WIRING.task_files),
    output:
        results=report(
            f"{RUN}/eval/results.json",
            caption="../report/evaluation.rst",
            category="Evaluation",
            labels={"run": "{run}"},
        ),
        samples=f"{RUN}/eval/samples.jsonl",
    log:
        f"{RUN}/logs/evaluate.log",
    conda:
        "../../envs/evaluate.yaml"
    threads: job_threads(WIRING, "evaluate")
    resources:
        **job_resources(WIRING, SITE, "evaluate"),
    params:
        config=lambda w: WIRING.config(w.run, "evaluate"),
        model=subpath(input.model, parent=True),
        data=subpath(input.data, parent=True),
        tasks=WIRING.tasks,
        directory=subpath(output.results, parent=True),
    shell:
        "python -m dayzero.stages.evaluate --config {params.config:q} --model {params.model:q} --data {params.data:q}"
        " --tasks-dir {params.tasks:q} --output {params.directory:q} --log {log:q}"


rule verify_serving:
    input:
        model=f"{RUN}/model/manifest.json",
        tokens=by_run(WIRING, WIRING.tokens_manifest),
    output:
        parity=report(
            f"{RUN}/serve/parity.json",
            caption="../report/serving.rst",
            category="Serving",
            labels={"run": "{run}"},
        ),
    log:
        f"{RUN}/logs/verify_serving.log",
    conda:
        "../../envs/serve.yaml"
    threads: job_threads(WIRING, "verify_serving")
    resources:
        **job_resources(WIRING, SITE, "verify_serving"),
    params:
        config=lambda w: WIRING.config(w.run, "verify_serving"),
        model=subpath(input.model, parent=True),
        tokens=subpath(input.tokens, parent=True),
        directory=subpath(output.parity, parent=True),
    shell:
        "python -m dayzero.stages.verify_serving --config {params.config:q} --model {params.model:q}"
        " --tokens {params.tokens:q} --output {params.directory:q} --log {log:q}"
