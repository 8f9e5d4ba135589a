"""What every life of a command would import first: paid once, in the fork server, instead of seconds in each life."""

import importlib

import torch
import transformers

MODULES = (
    *(
        "deepspeed",
        "mlflow",
        "orchestrator.cli.run",
        "orchestrator.run.inline",
        "orchestrator.tracking.mlflow",
    ),
    *("matplotlib.figure", "scipy.stats", "orchestrator.report.page"),
    *("trainers.evaluate.scoring", "trainers.models.tiny", "trainers.train.loop"),
)
# transformers imports these when they are first named.
CLASSES = ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "LlamaForSequenceClassification")

torch.set_num_threads(1)
for module in MODULES:
    importlib.import_module(module)
for name in CLASSES:
    getattr(transformers, name)
