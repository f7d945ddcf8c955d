rule resolve_config:
    output:
        config=f"{RUN}/config.json",
    log:
        f"{RUN}/logs/resolve_config.log",
    conda:
        "../../envs/train.yaml"
    threads: 1
    resources:
        mem_mb=1000,
        runtime=10,
        gpu=0,
    params:
        experiment=EXPERIMENT_FILE,
        overrides=lambda w: override_arguments(OVERRIDES, w.run),
        resolved=lambda w: WIRING.resolved(w.run),
    shell:
        "python -m dayzero.stages.resolve_config --experiment {params.experiment:q} --run {wildcards.run:q}"
        " --set {params.overrides:q} --output {output.config:q} --log {log:q}"


rule fetch_model:
    input:
        local=lambda w: WIRING.local_model(w.key),
    output:
        manifest=f"{STORE}/models/{{key}}/manifest.json",
    log:
        f"{STORE}/logs/fetch_model-{{key}}.log",
    conda:
        "../../envs/train.yaml"
    threads: job_threads(WIRING, "fetch")
    resources:
        **job_resources(WIRING, SITE, "fetch"),
    params:
        spec=lambda w: WIRING.spec("models", w.key),
        directory=subpath(output.manifest, parent=True),
    shell:
        "python -m dayzero.stages.fetch_model --config {params.spec:q} --output {params.directory:q} --log {log:q}"


rule fetch_data:
    input:
        local=lambda w: WIRING.local_data(w.key),
    output:
        manifest=f"{STORE}/data/{{key}}/manifest.json",
    log:
        f"{STORE}/logs/fetch_data-{{key}}.log",
    conda:
        "../../envs/train.yaml"
    threads: job_threads(WIRING, "fetch")
    resources:
        **job_resources(WIRING, SITE, "fetch"),
        streaming=lambda w: WIRING.streaming(w.key),  # not a parameter: it changes no row, so it reruns nothing
    params:
        spec=lambda w: WIRING.spec("data", w.key),
        directory=subpath(output.manifest, parent=True),
    shell:
        "python -m dayzero.stages.fetch_data --config {params.spec:q} --output {params.directory:q} --log {log:q}"
        " {resources.streaming}"


rule check_data:
    input:
        data=lambda w: f"{WIRING.data(WIRING.of_key(w.key))}/manifest.json",
        tasks=lambda w: WIRING.check_task_files(w.key),
    output:
        manifest=f"{STORE}/checks/{{key}}/manifest.json",
    log:
        f"{STORE}/logs/check_data-{{key}}.log",
    priority: 10  # before the costly stages
    conda:
        "../../envs/evaluate.yaml"
    threads: job_threads(WIRING, "check_data")
    resources:
        **job_resources(WIRING, SITE, "check_data"),
    params:
        spec=lambda w: WIRING.spec("checks", w.key),
        data=subpath(input.data, parent=True),
        tasks=WIRING.tasks,
        directory=subpath(output.manifest, parent=True),
    shell:
        "python -m dayzero.stages.check_data --config {params.spec:q} --data {params.data:q}"
        " --tasks-dir {params.tasks:q} --output {params.directory:q} --log {log:q}"


rule train_tokenizer:
    input:
        data=lambda w: f"{WIRING.data(WIRING.of_key(w.key))}/manifest.json",
    output:
        manifest=f"{STORE}/tokenizers/{{key}}/manifest.json",
    log:
        f"{STORE}/logs/train_tokenizer-{{key}}.log",
    conda:
        "../../envs/train.yaml"
    threads: job_threads(WIRING, "tokenize")
    resources:
        **job_resources(WIRING, SITE, "tokenize"),
    params:
        spec=lambda w: WIRING.spec("tokenizers", w.key),
        data=subpath(input.data, parent=True),
        directory=subpath(output.manifest, parent=True),
    shell:
        "python -m dayzero.stages.train_tokenizer --config {params.spec:q} --data {params.data:q}"
        " --output {params.directory:q} --log {log:q}"


rule tokenize:
    input:
        data=lambda w: f"{WIRING.data(WIRING.of_key(w.key))}/manifest.json",
        tokenizer=lambda w: f"{WIRING.tokenizer(WIRING.of_key(w.key))}/manifest.json",
        chat_template=lambda w: WIRING.chat_template(WIRING.of_key(w.key)),
    output:
        manifest=f"{STORE}/tokens/{{key}}/manifest.json",
    log:
        f"{STORE}/logs/tokenize-{{key}}.log",
    conda:
        "../../envs/train.yaml"
    threads: job_threads(WIRING, "tokenize")
    resources:
        **job_resources(WIRING, SITE, "tokenize"),
    params:
        spec=lambda w: WIRING.spec("tokens", w.key),
        data=subpath(input.data, parent=True),
        tokenizer=subpath(input.tokenizer, parent=True),
        directory=subpath(output.manifest, parent=True),
    shell:
        "python -m dayzero.stages.tokenize --config {params.spec:q} --data {params.data:q}"
        " --tokenizer {params.tokenizer:q} --output {params.directory:q} --num-workers {threads} --log {log:q}"
