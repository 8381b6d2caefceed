"""Manifests that are refused, with every line `sft validate` prints for them, and some that are not; and changes."""

from __future__ import annotations

from typing import Any

from tests.api.jobs import GONE

NAME = "at most 40 lower-case letters, digits and hyphens"
DATA_URI = (
    "the URI of a .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, or a glob that ends in *, ? or ]: "
    "file://PATH, s3://, gs:// or az:// with bucket and path, hf://OWNER/NAME/PATH, or pvc://CLAIM/PATH"
)
MODEL_URI = (
    "the URI of a model folder: hf://OWNER/NAME, file://PATH, s3://, gs:// or az:// with bucket and path, "
    "or pvc://CLAIM/PATH"
)
STORE_URI = "the URI of a folder to write to: file://PATH, s3://, gs:// or az:// with a bucket, or pvc://CLAIM/PATH"
SPEC_FIELDS = (
    "model (required), recipe, strategy, phases (required), epochs, validation, batch, optimizer, trainer, "
    "preparedData, checkpoints (required), scheduling, lifecycle, suspend, seed"
)
TRAINER_FIELDS = (
    "nodes, gpusPerNode, zeroStage, attention, activationCheckpointing, precision, image, resources, nodeSelector, "
    "tolerations, env, sharedMemory, podTemplate"
)
OURS = (
    "names that begin with SFT_ or PET_ are ours, and so are RANK, LOCAL_RANK, GROUP_RANK, WORLD_SIZE, "
    "LOCAL_WORLD_SIZE, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT"
)
QUANTITY = 'a quantity: a whole number, or text such as "0.5", 500m or 64Gi'
OBJECT = "the name of an object: lower-case letters, digits, hyphens and dots"
BATCH_FIELDS = "effectiveBatchSize, maxTokensPerGPU, maxSequenceLength, overlong, packing"
FIT = "a sample has to fit into one micro-batch; raise maxTokensPerGPU or lower maxSequenceLength"
STACKED = "cannot be obeyed under strategy Stacked (the default), which trains on the data of all phases as one"

BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another version": (
        {"apiVersion": "sftjob.dev/v1"},
        ['apiVersion: "sftjob.dev/v1" is not allowed; allowed: sftjob.dev/v1alpha1; did you mean sftjob.dev/v1alpha1?'],
    ),
    "kind in the wrong case": (
        {"kind": "SftJob"},
        ['kind: "SftJob" is not allowed; allowed: SFTJob; did you mean SFTJob?'],
    ),
    "name with capitals": (
        {"metadata.name": "Granite_LAB"},
        [f'metadata.name: "Granite_LAB" is not allowed; allowed: {NAME}, first a letter, last no hyphen'],
    ),
    "name of 41 characters": (
        {"metadata.name": "a" * 41},
        [f'metadata.name: "{"a" * 41}" is not allowed; allowed: {NAME}, first a letter, last no hyphen'],
    ),
    "name that begins with a digit": (
        {"metadata.name": "7b"},
        [f'metadata.name: "7b" is not allowed; allowed: {NAME}, first a letter, last no hyphen'],
    ),
    "no model and no phases": (
        {"spec.model": GONE, "spec.phases": GONE},
        [
            "spec.model: is required and missing; give a mapping with the fields "
            "uri (required), revision, trustRemoteCode, chatTemplate",
            "spec.phases: is required and missing; give a list of 1 to 32 elements",
        ],
    ),
    "model without a scheme": (
        {"spec.model.uri": "granite"},
        [f'spec.model.uri: "granite" is not allowed; allowed: {MODEL_URI}'],
    ),
    "model by its web page": (
        {"spec.model.uri": "https://huggingface.co/ibm-granite/granite-3.1-2b-base"},
        [
            'spec.model.uri: "https://huggingface.co/ibm-granite/granite-3.1-2b-base" is not allowed; '
            f"allowed: {MODEL_URI}"
        ],
    ),
    "model with its revision in the URI": (
        {"spec.model.uri": "hf://ibm-granite/granite-3.1-2b-base@main"},
        [f'spec.model.uri: "hf://ibm-granite/granite-3.1-2b-base@main" is not allowed; allowed: {MODEL_URI}'],
    ),
    "revision of a model in a bucket": (
        {"spec.model": {"uri": "s3://lab/granite", "revision": "main"}},
        [
            "spec.model.revision: cannot be obeyed: s3://lab/granite is not at hf://, and only models there have "
            "revisions; remove it"
        ],
    ),
    "template given twice": (
        {"spec.model.chatTemplate": {"name": "ChatML", "uri": "s3://lab/template.jinja"}},
        ["spec.model.chatTemplate: gives both name and uri; give exactly one of name, inline and uri"],
    ),
    "template given in three ways": (
        {"spec.model.chatTemplate": {"name": "ChatML", "inline": "x", "uri": "s3://lab/template.jinja"}},
        ["spec.model.chatTemplate: gives name, inline and uri; give exactly one of name, inline and uri"],
    ),
    "template that is none": (
        {"spec.model.chatTemplate": {}},
        ["spec.model.chatTemplate: gives none; give exactly one of name, inline and uri"],
    ),
    "unknown template": (
        {"spec.model.chatTemplate": {"name": "Chat-ML"}},
        [
            'spec.model.chatTemplate.name: "Chat-ML" is not allowed; '
            "allowed: ChatML, Llama3, Granite, Mistral, Zephyr; did you mean ChatML?"
        ],
    ),
    "tokens for a built-in template": (
        {"spec.model.chatTemplate": {"name": "ChatML", "specialTokens": ["<|a|>"], "endOfTurn": "<|b|>"}},
        [
            "spec.model.chatTemplate.specialTokens: cannot be obeyed: the built-in template ChatML brings its own; "
            "allowed with inline or uri",
            "spec.model.chatTemplate.endOfTurn: cannot be obeyed: the built-in template ChatML brings its own; "
            "allowed with inline or uri",
        ],
    ),
    "recipe in lower case": (
        {"spec.recipe": "lab"},
        ['spec.recipe: "lab" is not allowed; allowed: LAB, TULU, TULUPlusPlus, none; did you mean LAB?'],
    ),
    "unknown strategy": (
        {"spec.strategy": "Curriculum"},
        ['spec.strategy: "Curriculum" is not allowed; allowed: Stacked, Phased, ByLength'],
    ),
    "no phases": (
        {"spec.phases": []},
        ["spec.phases: an empty list is not allowed; allowed: a list of 1 to 32 elements"],
    ),
    "a phase that is a word": (
        {"spec.phases[1]": "skills"},
        [
            'spec.phases[1]: "skills" is not allowed; allowed: a mapping with the fields '
            "name (required), data (required), epochs, batch, optimizer"
        ],
    ),
    "two phases of one name": (
        {"spec.phases[1].name": "instruct"},
        ['spec.phases[1].name: "instruct" is already the name of spec.phases[0]; give each phase its own'],
    ),
    "reserved phase name": (
        {"spec.phases[0].name": "validation"},
        ['spec.phases[0].name: "validation" is reserved for the held-out data; choose another name'],
    ),
    "phase name with an underscore": (
        {"spec.phases[0].name": "phase_00"},
        [f'spec.phases[0].name: "phase_00" is not allowed; allowed: {NAME}, a hyphen neither first nor last'],
    ),
    "data that is not a data file": (
        {"spec.phases[1].data[0].uri": "s3://lab/skills.json"},
        [f'spec.phases[1].data[0].uri: "s3://lab/skills.json" is not allowed; allowed: {DATA_URI}'],
    ),
    "data without a scheme": (
        {"spec.phases[0].data[0].uri": "/data/instruct.jsonl"},
        [f'spec.phases[0].data[0].uri: "/data/instruct.jsonl" is not allowed; allowed: {DATA_URI}'],
    ),
    "overrides in stacked phases": (
        {"spec.phases[1].epochs": 3, "spec.phases[1].batch": {}, "spec.phases[0].optimizer": {"learningRate": 1e-5}},
        [
            f"spec.phases[0].optimizer: {STACKED}; set spec.optimizer instead, or spec.strategy: Phased",
            f"spec.phases[1].epochs: {STACKED}; set spec.epochs instead, or spec.strategy: Phased",
            f"spec.phases[1].batch: {STACKED}; set spec.batch instead, or spec.strategy: Phased",
        ],
    ),
    "overrides in phases by length": (
        {"spec.strategy": "ByLength", "spec.phases[1].epochs": 3},
        [
            "spec.phases[1].epochs: cannot be obeyed under strategy ByLength, which trains on the data of all phases "
            "by length; set spec.epochs instead, or spec.strategy: Phased"
        ],
    ),
    "no recipe and nothing said": (
        {"spec.recipe": "none"},
        [
            "spec.epochs: is required with recipe none, which fills in nothing",
            "spec.batch.effectiveBatchSize: is required with recipe none, which fills in nothing",
            "spec.optimizer.learningRate: is required with recipe none, which fills in nothing",
        ],
    ),
    "no recipe and no epochs": (
        {"spec.recipe": "none", "spec.batch": {"effectiveBatchSize": 8}, "spec.optimizer": {"learningRate": 1e-5}},
        ["spec.epochs: is required with recipe none, which fills in nothing"],
    ),
    "no recipe and no batch size": (
        {"spec.recipe": "none", "spec.epochs": 1, "spec.optimizer": {"learningRate": 1e-5}},
        ["spec.batch.effectiveBatchSize: is required with recipe none, which fills in nothing"],
    ),
    "no recipe and one phase silent": (
        {
            "spec.recipe": "none",
            "spec.strategy": "Phased",
            "spec.epochs": 1,
            "spec.batch": {"effectiveBatchSize": 8},
            "spec.phases[0].optimizer": {"learningRate": 1e-5},
        },
        ["spec.optimizer.learningRate: is required with recipe none, which fills in nothing"],
    ),
    "typo": (
        {"spec.epoch": 3},
        [
            f"spec.epoch: is no field of spec; did you mean epochs? allowed: {SPEC_FIELDS}",
        ],
    ),
    "typo without a value": (
        {"spec.phases[0].epoch": None},
        [
            "spec.phases[0].epoch: is no field of spec.phases[0]; did you mean epochs? "
            "allowed: name (required), data (required), epochs, batch, optimizer"
        ],
    ),
    "typo in a list": (
        {"spec.phases[1].data[0].url": "s3://lab/skills.jsonl", "spec.phases[1].data[0].uri": GONE},
        [
            f"spec.phases[1].data[0].uri: is required and missing; give {DATA_URI}",
            "spec.phases[1].data[0].url: is no field of spec.phases[1].data[0]; did you mean uri? "
            "allowed: uri (required), format",
        ],
    ),
    "field of another place": (
        {"spec.trainer.effectiveBatchSize": 64},
        [
            "spec.trainer.effectiveBatchSize: is no field of spec.trainer; did you mean spec.batch.effectiveBatchSize "
            f"or spec.phases[…].batch.effectiveBatchSize? allowed: {TRAINER_FIELDS}"
        ],
    ),
    "field in another spelling": (
        {"spec.batch": {"max_sequence_length": 512}},
        [
            "spec.batch.max_sequence_length: is no field of spec.batch; did you mean maxSequenceLength? "
            f"allowed: {BATCH_FIELDS}"
        ],
    ),
    "zero epochs": (
        {"spec.epochs": 0},
        ["spec.epochs: 0 is not allowed; allowed: a whole number from 1 to 10000"],
    ),
    "half an epoch": (
        {"spec.epochs": 0.5},
        ["spec.epochs: 0.5 is not allowed; allowed: a whole number from 1 to 10000"],
    ),
    "a number in quotes": (
        {"spec.epochs": "3"},
        ['spec.epochs: "3" is not allowed; allowed: a whole number from 1 to 10000; write it without quotes'],
    ),
    "a yes in quotes": (
        {"spec.trainer": {"activationCheckpointing": "true"}},
        [
            'spec.trainer.activationCheckpointing: "true" is not allowed; allowed: true or false; '
            "write it without quotes"
        ],
    ),
    "a yes where a number stands": (
        {"spec.seed": True},
        ["spec.seed: true is not allowed; allowed: a whole number from 0 to 2147483647"],
    ),
    "learning rate of zero": (
        {"spec.optimizer": {"learningRate": 0}},
        ["spec.optimizer.learningRate: 0 is not allowed; allowed: a number above 0 and at most 1"],
    ),
    "one beta": (
        {"spec.optimizer": {"betas": [0.9]}},
        ["spec.optimizer.betas: a list of 1 element is not allowed; allowed: a list of 2 elements"],
    ),
    "a beta of one": (
        {"spec.optimizer": {"betas": [0.9, 1]}},
        ["spec.optimizer.betas[1]: 1 is not allowed; allowed: a number at least 0 and below 1"],
    ),
    "warm-up said twice": (
        {"spec.optimizer": {"warmup": {"steps": 25, "ratio": 0.03}}},
        ["spec.optimizer.warmup: gives both steps and ratio; give exactly one of steps and ratio"],
    ),
    "warm-up of a phase said twice": (
        {"spec.strategy": "Phased", "spec.phases[1].optimizer": {"warmup": {"steps": 25, "ratio": 0.03}}},
        ["spec.phases[1].optimizer.warmup: gives both steps and ratio; give exactly one of steps and ratio"],
    ),
    "warm-up as a number": (
        {"spec.optimizer": {"warmup": 25}},
        ["spec.optimizer.warmup: 25 is not allowed; allowed: a mapping with the fields steps, ratio"],
    ),
    "held out twice": (
        {"spec.validation": {"fraction": 0.1, "uri": "s3://lab/held-out.jsonl"}},
        ["spec.validation: gives both fraction and uri; give exactly one of fraction and uri"],
    ),
    "nothing held out": (
        {"spec.validation": {"every": {"steps": 5}}},
        ["spec.validation: gives none; give exactly one of fraction and uri"],
    ),
    "format of a fraction": (
        {"spec.validation": {"fraction": 0.1, "format": "Messages"}},
        [
            "spec.validation.format: is allowed only with uri; samples held out by fraction have the format of their "
            "phase"
        ],
    ),
    "everything held out": (
        {"spec.validation": {"fraction": 1}},
        ["spec.validation.fraction: 1 is not allowed; allowed: a number above 0 and below 1"],
    ),
    "scored by two measures": (
        {"spec.validation": {"fraction": 0.1, "every": {"steps": 5, "samples": 5}}},
        ["spec.validation.every: gives both steps and samples; give exactly one of steps and samples"],
    ),
    "scored in minutes": (
        {"spec.validation": {"fraction": 0.1, "every": {"minutes": 5}}},
        [
            "spec.validation.every.minutes: is no field of spec.validation.every; "
            "did you mean spec.checkpoints.every.minutes? allowed: steps, samples",
            "spec.validation.every: gives none; give exactly one of steps and samples",
        ],
    ),
    "checkpoints every two things": (
        {"spec.checkpoints.every": {"steps": 5, "minutes": 5}},
        ["spec.checkpoints.every: gives both steps and minutes; give exactly one of steps, samples and minutes"],
    ),
    "checkpoints on the Hub": (
        {"spec.checkpoints.uri": "hf://lab/runs"},
        [f'spec.checkpoints.uri: "hf://lab/runs" is not allowed; allowed: {STORE_URI}'],
    ),
    "checkpoints in the root folder": (
        {"spec.checkpoints.uri": "file:///"},
        [f'spec.checkpoints.uri: "file:///" is not allowed; allowed: {STORE_URI}'],
    ),
    "checkpoints in a glob": (
        {"spec.checkpoints.uri": "s3://lab/runs/*"},
        [f'spec.checkpoints.uri: "s3://lab/runs/*" is not allowed; allowed: {STORE_URI}'],
    ),
    "the best without a measure": (
        {"spec.checkpoints.keep": {"best": 1}},
        [
            "spec.checkpoints.keep.best: 1 needs spec.validation, whose loss ranks the checkpoints; add it, or set "
            "best: 0"
        ],
    ),
    "none kept": (
        {"spec.checkpoints.keep": {"last": 0}},
        ["spec.checkpoints.keep.last: 0 is not allowed; allowed: a whole number from 1 to 10000"],
    ),
    "an upload limit that stops all uploads": (
        {"spec.checkpoints.uploadMegabytesPerSecond": 0},
        ["spec.checkpoints.uploadMegabytesPerSecond: 0 is not allowed; allowed: a whole number from 1 to 1000000"],
    ),
    "a micro-batch shorter than the default sample": (
        {"spec.batch": {"maxTokensPerGPU": 2048}},
        [f"spec.batch.maxTokensPerGPU: 2048 is less than maxSequenceLength, 4096 by default: {FIT}"],
    ),
    "a micro-batch shorter than a sample": (
        {"spec.batch": {"maxTokensPerGPU": 8192, "maxSequenceLength": 8193}},
        [f"spec.batch.maxTokensPerGPU: 8192 is less than maxSequenceLength, 8193: {FIT}"],
    ),
    "a phase's micro-batch shorter than the job's sample": (
        {"spec.strategy": "Phased", "spec.phases[1].batch": {"maxTokensPerGPU": 2048}},
        [f"spec.phases[1].batch.maxTokensPerGPU: 2048 is less than maxSequenceLength, here 4096: {FIT}"],
    ),
    "a phase's sample longer than the job's micro-batch": (
        {
            "spec.strategy": "Phased",
            "spec.batch": {"maxTokensPerGPU": 8192},
            "spec.phases[1].batch": {"maxSequenceLength": 16384},
        },
        [f"spec.phases[1].batch.maxSequenceLength: 16384 is more than maxTokensPerGPU, 8192: {FIT}"],
    ),
    "attention of a GPU on the CPU": (
        {"spec.trainer": {"gpusPerNode": 0, "attention": "Varlen"}},
        ["spec.trainer.attention: Varlen needs a GPU, and gpusPerNode is 0; allowed: SDPA, or leave it out"],
    ),
    "FlashAttention in FP32": (
        {"spec.trainer": {"precision": "FP32", "attention": "FlashAttention2"}},
        [
            "spec.trainer.attention: FlashAttention2 computes in BF16 only, and precision is FP32; "
            "allowed: SDPA, or leave it out"
        ],
    ),
    "ZeRO stage 0": (
        {"spec.trainer": {"zeroStage": 0}},
        ["spec.trainer.zeroStage: 0 is not allowed; allowed: a whole number from 1 to 3"],
    ),
    "a claim whose name is none": (
        {"spec.checkpoints.uri": "pvc://Lab_Runs/granite"},
        [f'spec.checkpoints.uri: "pvc://Lab_Runs/granite" is not allowed; allowed: {STORE_URI}'],
    ),
    "data in a claim that is not a data file": (
        {"spec.phases[0].data[0].uri": "pvc://lab-data"},
        [f'spec.phases[0].data[0].uri: "pvc://lab-data" is not allowed; allowed: {DATA_URI}'],
    ),
    "an image with a blank": (
        {"spec.trainer": {"image": "registry/sft trainer"}},
        ['spec.trainer.image: "registry/sft trainer" is not allowed; allowed: an image: REGISTRY/NAME:TAG'],
    ),
    "a quantity in other letters": (
        {"spec.trainer": {"resources": {"requests": {"memory": "64GB"}}}},
        [f'spec.trainer.resources.requests.memory: "64GB" is not allowed; allowed: {QUANTITY}'],
    ),
    "half a CPU as a number": (
        {"spec.trainer": {"resources": {"limits": {"cpu": 0.5}}}},
        [f"spec.trainer.resources.limits.cpu: 0.5 is not allowed; allowed: {QUANTITY}"],
    ),
    "less than no memory": (
        {"spec.trainer": {"resources": {"limits": {"memory": -1}}}},
        [f'spec.trainer.resources.limits.memory: "-1" is not allowed; allowed: {QUANTITY}'],
    ),
    "a resource that is a yes": (
        {"spec.trainer": {"resources": {"limits": {"cpu": True}}}},
        [f"spec.trainer.resources.limits.cpu: true is not allowed; allowed: {QUANTITY}"],
    ),
    "a resource that is none": (
        {"spec.trainer": {"resources": {"requests": {"mem": "64Gi"}}}},
        [
            "spec.trainer.resources.requests.mem: is no resource; allowed: cpu, memory, ephemeral-storage, "
            "hugepages-SIZE or DOMAIN/NAME"
        ],
    ),
    "GPUs among the resources": (
        {"spec.trainer": {"resources": {"limits": {"nvidia.com/gpu": 8}}}},
        ["spec.trainer.resources.limits.nvidia.com/gpu: cannot be set: spec.trainer.gpusPerNode says it"],
    ),
    "33 resources": (
        {"spec.trainer": {"resources": {"limits": {f"lab.dev/x{number}": 1 for number in range(33)}}}},
        [
            "spec.trainer.resources.limits: a mapping (lab.dev/x0, lab.dev/x1, lab.dev/x2, …) is not allowed; "
            f"allowed: a mapping of text to {QUANTITY}; at most 32 of them"
        ],
    ),
    "no shared memory": (
        {"spec.trainer": {"sharedMemory": 0}},
        ['spec.trainer.sharedMemory: "0" is not allowed; allowed: an amount of memory: 16Gi, 512Mi, or bytes'],
    ),
    "nodes by a label that is none": (
        {"spec.trainer": {"nodeSelector": {"lab.dev/": "a", "zone": "a"}}},
        ["spec.trainer.nodeSelector.lab.dev/: is no label; allowed: NAME or DOMAIN/NAME"],
    ),
    "nodes by a number": (
        {"spec.trainer": {"nodeSelector": {"rack": 7}}},
        [
            "spec.trainer.nodeSelector.rack: 7 is not allowed; allowed: text of at most 63 letters, digits, hyphens, "
            "underscores and dots, first and last a letter or digit"
        ],
    ),
    "a taint that exists and has a value": (
        {"spec.trainer": {"tolerations": [{"key": "gpu", "operator": "Exists", "value": "yes"}]}},
        ["spec.trainer.tolerations[0].value: is allowed only with operator Equal; Exists takes every value"],
    ),
    "a taint without a key": (
        {"spec.trainer": {"tolerations": [{"effect": "NoSchedule"}]}},
        [
            "spec.trainer.tolerations[0].key: is required with operator Equal; without it, operator: Exists puts up "
            "with every taint"
        ],
    ),
    "seconds on a node that no pod has to leave": (
        {"spec.trainer": {"tolerations": [{"key": "gpu", "effect": "NoSchedule", "tolerationSeconds": 60}]}},
        [
            "spec.trainer.tolerations[0].tolerationSeconds: is allowed only with effect NoExecute, the one that makes "
            "pods leave"
        ],
    ),
    "a variable with a hyphen": (
        {"spec.trainer": {"env": [{"name": "NCCL-DEBUG", "value": "INFO"}]}},
        [
            'spec.trainer.env[0].name: "NCCL-DEBUG" is not allowed; allowed: letters, digits and underscores, '
            "first no digit"
        ],
    ),
    "variables that are ours": (
        {"spec.trainer": {"env": [{"name": "WORLD_SIZE", "value": "2"}, {"name": "SFT_X", "value": ""}]}},
        [
            f"spec.trainer.env[0].name: WORLD_SIZE cannot be set: {OURS}",
            f"spec.trainer.env[1].name: SFT_X cannot be set: {OURS}",
        ],
    ),
    "a variable without a value": (
        {"spec.trainer": {"env": [{"name": "A"}]}},
        ["spec.trainer.env[0]: gives none; give exactly one of value and valueFrom"],
    ),
    "a variable with two values": (
        {
            "spec.trainer": {
                "env": [{"name": "A", "value": "x", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}]
            }
        },
        ["spec.trainer.env[0]: gives both value and valueFrom; give exactly one of value and valueFrom"],
    ),
    "a variable from nowhere": (
        {"spec.trainer": {"env": [{"name": "A", "valueFrom": {}}]}},
        [
            "spec.trainer.env[0].valueFrom: gives none; give exactly one of secretKeyRef and configMapKeyRef",
        ],
    ),
    "one variable twice": (
        {
            "spec.trainer": {
                "env": [{"name": "A", "value": "x"}, {"name": "B", "value": "x"}, {"name": "A", "value": ""}]
            }
        },
        ["spec.trainer.env[2].name: A is already the name of env[0]; give each name once"],
    ),
    "a key that no Secret has": (
        {"spec.trainer": {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "a/b"}}}]}},
        [
            'spec.trainer.env[0].valueFrom.secretKeyRef.key: "a/b" is not allowed; '
            "allowed: letters, digits, hyphens, underscores and dots"
        ],
    ),
    "containers beside the spec of a pod": (
        {"spec.trainer": {"podTemplate": {"containers": []}}},
        [
            "spec.trainer.podTemplate.containers: is no field of spec.trainer.podTemplate; allowed: metadata, spec",
        ],
    ),
    "a name for every pod": (
        {"spec.trainer": {"podTemplate": {"metadata": {"name": "trainer"}}}},
        [
            "spec.trainer.podTemplate.metadata.name: is no field of spec.trainer.podTemplate.metadata; "
            "did you mean spec.phases[…].name or spec.trainer.env[…].name? allowed: labels, annotations"
        ],
    ),
    "labels of ours": (
        {"spec.trainer": {"podTemplate": {"metadata": {"labels": {"sftjob.dev/job": "x", "team": "lab"}}}}},
        [
            "spec.trainer.podTemplate.metadata.labels.sftjob.dev/job: cannot be set: it is the operator's",
        ],
    ),
    "an annotation that is no text": (
        {"spec.trainer": {"podTemplate": {"metadata": {"annotations": {"note": 5}}}}},
        [
            "spec.trainer.podTemplate.metadata.annotations.note: 5 is not allowed; "
            "allowed: text of at most 16384 characters"
        ],
    ),
    "credentials in two ways": (
        {"spec.checkpoints.credentials": {"secretRef": {"name": "lab-s3"}, "serviceAccountName": "lab"}},
        [
            "spec.checkpoints.credentials: gives both secretRef and serviceAccountName; "
            "give exactly one of secretRef and serviceAccountName"
        ],
    ),
    "credentials that are none": (
        {"spec.checkpoints.credentials": {}},
        ["spec.checkpoints.credentials: gives none; give exactly one of secretRef and serviceAccountName"],
    ),
    "a Secret whose name is none": (
        {"spec.checkpoints.credentials": {"secretRef": {"name": "Lab..S3"}}},
        [f'spec.checkpoints.credentials.secretRef.name: "Lab..S3" is not allowed; allowed: {OBJECT}'],
    ),
    "a gang in lower case": (
        {"spec.scheduling": {"gang": "volcano"}},
        [
            'spec.scheduling.gang: "volcano" is not allowed; allowed: Auto, Native, Volcano, Coscheduling, Kueue, KAI, '
            "None; did you mean Volcano?"
        ],
    ),
    "Kueue without a queue": (
        {"spec.scheduling": {"gang": "Kueue"}},
        ["spec.scheduling.queue: is required with gang Kueue: the name of a LocalQueue in the job's namespace"],
    ),
    "a queue that nobody has": (
        {"spec.scheduling": {"queue": "lab"}},
        [
            "spec.scheduling.queue: cannot be obeyed with gang Auto (the default); allowed with Volcano, Kueue or KAI",
        ],
    ),
    "a queue of Kubernetes itself": (
        {"spec.scheduling": {"gang": "Native", "queue": "lab"}},
        ["spec.scheduling.queue: cannot be obeyed with gang Native; allowed with Volcano, Kueue or KAI"],
    ),
    "no time to be scheduled": (
        {"spec.scheduling": {"timeoutSeconds": 0}},
        ["spec.scheduling.timeoutSeconds: 0 is not allowed; allowed: a whole number from 1 to 10000000"],
    ),
    "no time for a step": (
        {"spec.lifecycle": {"hangTimeoutSeconds": 1}},
        ["spec.lifecycle.hangTimeoutSeconds: 1 is not allowed; allowed: a whole number from 10 to 1000000"],
    ),
    "no loss at all": (
        {"spec.lifecycle": {"lossGuard": 0}},
        ["spec.lifecycle.lossGuard: 0 is not allowed; allowed: a number above 0 and at most 1e+09"],
    ),
    "less than no restarts": (
        {"spec.lifecycle": {"maxRestarts": -1}},
        ["spec.lifecycle.maxRestarts: -1 is not allowed; allowed: a whole number from 0 to 10000"],
    ),
    "suspended in quotes": (
        {"spec.suspend": "true"},
        ['spec.suspend: "true" is not allowed; allowed: true or false; write it without quotes'],
    ),
    "many things at once": (
        {"spec.recipe": "LABB", "spec.seed": -1, "spec.phases[1].name": "instruct", "spec.validation": {}},
        [
            'spec.recipe: "LABB" is not allowed; allowed: LAB, TULU, TULUPlusPlus, none; did you mean LAB?',
            "spec.seed: -1 is not allowed; allowed: a whole number from 0 to 2147483647",
            'spec.phases[1].name: "instruct" is already the name of spec.phases[0]; give each phase its own',
            "spec.validation: gives none; give exactly one of fraction and uri",
        ],
    ),
}

UNSEEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a restart policy for the pods of a gang": (
        {"spec.trainer": {"podTemplate": {"spec": {"restartPolicy": "Always"}}}},
        [
            "spec.trainer.podTemplate.spec.restartPolicy: cannot be set: a gang is restarted whole, by the operator; "
            "spec.lifecycle says how often"
        ],
    ),
    "another group for the pods of a gang": (
        {"spec.trainer": {"podTemplate": {"spec": {"schedulingGroup": {"podGroupName": "x"}}}}},
        [
            "spec.trainer.podTemplate.spec.schedulingGroup: cannot be set: spec.scheduling.gang says who places the "
            "pods together"
        ],
    ),
    "one host name for all": (
        {"spec.trainer": {"podTemplate": {"spec": {"hostname": "a", "subdomain": "b"}}}},
        [
            f"spec.trainer.podTemplate.spec.{name}: cannot be set: the pods of a gang find each other by the names "
            "they are given"
            for name in ("hostname", "subdomain")
        ],
    ),
    "containers that are none": (
        {"spec.trainer": {"podTemplate": {"spec": {"containers": {"name": "pytorch"}}}}},
        ["spec.trainer.podTemplate.spec.containers: a mapping (name) is not allowed; allowed: a list"],
    ),
    "containers without names": (
        {"spec.trainer": {"podTemplate": {"spec": {"containers": [{"image": "x"}], "initContainers": ["x"]}}}},
        [
            f"spec.trainer.podTemplate.spec.{kind}[0].name: is required and missing: by it the {kind} are merged into "
            "ours"
            for kind in ("containers", "initContainers")
        ],
    ),
    "another program in the trainer's container": (
        {
            "spec.trainer": {
                "podTemplate": {
                    "spec": {"containers": [{"name": "pytorch", "command": ["sh"], "args": ["-c"], "image": "busybox"}]}
                }
            }
        },
        [
            "spec.trainer.podTemplate.spec.containers[0].command: cannot be set: what the container runs is ours",
            "spec.trainer.podTemplate.spec.containers[0].args: cannot be set: what the container runs is ours",
            "spec.trainer.podTemplate.spec.containers[0].image: cannot be set: spec.trainer.image says it",
        ],
    ),
    "variables of ours in the trainer's container": (
        {
            "spec.trainer": {
                "podTemplate": {
                    "spec": {
                        "containers": [
                            {"name": "proxy", "env": [{"name": "RANK", "value": "1"}]},
                            {
                                "name": "pytorch",
                                "env": [{"name": "RANK", "value": "1"}, {"value": "x"}],
                                "volumeMounts": [{"name": "data"}],
                            },
                        ]
                    }
                }
            }
        },
        [
            "spec.trainer.podTemplate.spec.containers[1].volumeMounts[0].mountPath: is required and missing: by it the "
            "volumeMounts are merged into ours",
            "spec.trainer.podTemplate.spec.containers[1].env[1].name: is required and missing: by it the env are "
            "merged into ours",
            f"spec.trainer.podTemplate.spec.containers[1].env[0].name: RANK cannot be set: {OURS}",
        ],
    ),
}
"""What an API server cannot see: there the operator says it, in a condition."""

GOOD: dict[str, dict[str, Any]] = {
    "smallest": {},
    "labels and what an API server writes": {
        "metadata.labels": {"team": "lab"},
        "metadata.annotations": {"note": "x"},
        "metadata.namespace": "lab",
        "metadata.uid": "5f0c",
        "metadata.generation": 2,
        "metadata.resourceVersion": "81",
        "metadata.creationTimestamp": "2026-01-02T03:04:05Z",
        "metadata.managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
    },
    "a name of 40 characters": {"metadata.name": "a" * 40},
    "nulls are not there": {"spec.optimizer": None, "spec.seed": None, "spec.checkpoints.keep": None},
    "revision of a Hub model": {"spec.model.revision": "v1.2"},
    "built-in template": {"spec.model.chatTemplate": {"name": "Llama3"}},
    "template of one's own": {
        "spec.model.chatTemplate": {"inline": "{{ x }}", "specialTokens": ["<|user|>"], "endOfTurn": "<|end|>"}
    },
    "template in a bucket": {"spec.model.chatTemplate": {"uri": "s3://lab/t.jinja", "endOfTurn": "<|end|>"}},
    "globs and every scheme": {
        "spec.phases[0].data": [
            {"uri": uri}
            for uri in (
                "file://data/x.jsonl",
                "file:///data/**/*.jsonl.gz",
                "gs://b/x.jsonl.zst",
                "az://c/x-?.parquet",
                "s3://b/part-[0-9]*",
                "hf://owner/name@main/train.jsonl",
                "hf://datasets/owner/name/*.parquet",
            )
        ]
    },
    "documents": {"spec.phases[0].data[0].format": "Pretraining"},
    "phased with overrides": {
        "spec.strategy": "Phased",
        "spec.phases[0].epochs": 7,
        "spec.phases[0].batch": {"effectiveBatchSize": 128, "maxSequenceLength": 32768},
        "spec.phases[1].optimizer": {"learningRate": 6e-6, "warmup": {"ratio": 0}, "state": "Reset"},
    },
    "by length": {"spec.strategy": "ByLength"},
    "no recipe, all said": {
        "spec.recipe": "none",
        "spec.epochs": 1,
        "spec.batch": {"effectiveBatchSize": 8},
        "spec.optimizer": {"learningRate": 1e-5},
    },
    "no recipe, said by the phases": {
        "spec.recipe": "none",
        "spec.strategy": "Phased",
        "spec.epochs": 1,
        "spec.batch": {"effectiveBatchSize": 8},
        "spec.phases[0].optimizer": {"learningRate": 1e-5},
        "spec.phases[1].optimizer": {"learningRate": 1e-6},
    },
    "a whole number where a fraction may stand": {"spec.optimizer": {"learningRate": 1, "weightDecay": 0}},
    "validation by fraction": {"spec.validation": {"fraction": 0.01, "every": {"steps": 50}}},
    "validation by URI": {"spec.validation": {"uri": "file://held-out.parquet", "format": "Pretraining"}},
    "the best by validation": {"spec.validation": {"fraction": 0.5}, "spec.checkpoints.keep": {"best": 2}},
    "a limit to uploads": {"spec.checkpoints.uploadMegabytesPerSecond": 200},
    "checkpoints by the minute": {"spec.checkpoints.every": {"minutes": 0.5}},
    "a bucket of its own": {"spec.checkpoints.uri": "s3://granite", "spec.preparedData": {"uri": "s3://prepared/"}},
    "a micro-batch of one sample": {"spec.batch": {"maxTokensPerGPU": 512, "maxSequenceLength": 512}},
    "CPU": {"spec.trainer": {"gpusPerNode": 0, "precision": "FP32", "attention": "SDPA", "zeroStage": 2}},
    "a folder on a claim for everything": {
        "spec.model": {"uri": "pvc://models/granite", "chatTemplate": {"uri": "pvc://models/t.jinja"}},
        "spec.phases[0].data[0].uri": "pvc://lab-data/**/*.parquet",
        "spec.validation": {"uri": "pvc://lab-data/held-out.jsonl"},
        "spec.checkpoints.uri": "pvc://runs",
        "spec.preparedData": {"uri": "pvc://runs/prepared/"},
    },
    "a model that is a whole claim": {"spec.model.uri": "pvc://granite"},
    "resources in numbers and in words": {
        "spec.trainer": {
            "nodes": 2,
            "image": "registry.lab:5000/sft-trainer@sha256:0f",
            "resources": {
                "requests": {"cpu": 8, "memory": "64Gi", "ephemeral-storage": "1.5e3"},
                "limits": {"hugepages-2Mi": "512Mi", "rdma/hca": 1, "cpu": "500m"},
            },
            "sharedMemory": "16Gi",
            "nodeSelector": {"nvidia.com/gpu.product": "H200", "zone": ""},
        }
    },
    "shared memory in bytes": {"spec.trainer": {"sharedMemory": 68719476736}},
    "taints of all kinds": {
        "spec.trainer": {
            "tolerations": [
                {"operator": "Exists"},
                {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
                {"key": "spot", "value": "true", "effect": "NoExecute", "tolerationSeconds": 0},
            ]
        }
    },
    "variables of all kinds": {
        "spec.trainer": {
            "env": [
                {"name": "NCCL_DEBUG", "value": "INFO"},
                {"name": "EMPTY", "value": ""},
                {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}},
                {"name": "https_proxy", "valueFrom": {"configMapKeyRef": {"name": "proxy", "key": "url"}}},
            ]
        }
    },
    "a pod's own": {
        "spec.trainer": {
            "podTemplate": {
                "metadata": {"labels": {"team": "lab"}, "annotations": {"note": "two words"}},
                "spec": {
                    "imagePullSecrets": [{"name": "registry"}],
                    "containers": [
                        {
                            "name": "pytorch",
                            "env": [{"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}],
                            "volumeMounts": [{"name": "scratch", "mountPath": "/scratch"}],
                        },
                        {"name": "proxy", "image": "proxy", "command": ["proxy"]},
                    ],
                    "volumes": [{"name": "scratch", "emptyDir": {}}],
                },
            }
        }
    },
    "nothing of a pod's own": {"spec.trainer": {"podTemplate": {}, "resources": {}, "env": [], "tolerations": []}},
    "credentials in a Secret": {"spec.checkpoints.credentials": {"secretRef": {"name": "lab-s3"}}},
    "credentials of a ServiceAccount": {"spec.checkpoints.credentials": {"serviceAccountName": "lab.trainer"}},
    "a queue of Kueue": {"spec.scheduling": {"gang": "Kueue", "queue": "lab", "timeoutSeconds": 600}},
    "a queue of Volcano": {"spec.scheduling": {"gang": "Volcano", "queue": "lab", "priorityClassName": "high"}},
    "no gang": {"spec.scheduling": {"gang": "None", "schedulerName": "my-scheduler"}},
    "a short life": {
        "spec.lifecycle": {
            "maxRestarts": 0,
            "maxDisruptions": 0,
            "activeDeadlineSeconds": 1,
            "ttlSecondsAfterFinished": 0,
            "hangTimeoutSeconds": 10,
            "lossGuard": 0.5,
        }
    },
    "suspended from the start": {"spec.suspend": True},
}

CHANGES: dict[str, Any] = {
    "spec.model.uri": "hf://ibm-granite/granite-3.1-8b-base",
    "spec.model.revision": "main",
    "spec.recipe": "TULU",
    "spec.strategy": "ByLength",
    "spec.phases[0].name": "other",
    "spec.phases[0].data[0].format": "Pretraining",
    "spec.epochs": 2,
    "spec.validation": {"fraction": 0.1},
    "spec.batch.effectiveBatchSize": 64,
    "spec.optimizer.schedule": "Cosine",
    "spec.trainer.nodes": 2,
    "spec.trainer.image": "registry/other",
    "spec.trainer.env": [{"name": "A", "value": "x"}],
    "spec.trainer.resources": {"limits": {"cpu": 8}},
    "spec.trainer.podTemplate": {"spec": {"hostNetwork": True}},
    "spec.scheduling.priorityClassName": "high",
    "spec.preparedData": {"uri": "s3://prepared/x"},
    "spec.checkpoints.credentials": {"secretRef": {"name": "lab-s3"}},
    "spec.checkpoints.uri": "s3://lab/runs/other",
    "spec.checkpoints.every": {"minutes": 5},
    "spec.checkpoints.export": "End",
    "spec.checkpoints.uploadMegabytesPerSecond": 200,
    "spec.seed": 1,
}
"""A change to the smallest manifest, to a field that is immutable."""

LABELS = "metadata.labels"
MAY_CHANGE: dict[str, Any] = {
    "spec.checkpoints.keep": {"last": 5, "phaseEnds": False},
    "spec.lifecycle": {"maxRestarts": 0, "activeDeadlineSeconds": 60, "lossGuard": 9.5},
    "spec.suspend": True,
    LABELS: {"team": "lab"},
}
"""A change that is let through."""
