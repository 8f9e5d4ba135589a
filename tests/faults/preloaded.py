"""What every life of a command would import first: paid once, in the fork server, instead of seconds in each life."""

import importlib

import torch
import transformers

from trainers.rewards import reward_types

MODULES = (
    *("orchestrator.cli.main", "orchestrator.cli.run", "orchestrator.run.inline", "sweeps.full_grid"),
    *("orchestrator.report.page", "orchestrator.tracking.mlflow"),
    *("trainers.evaluate.scoring", "trainers.models.tiny", "trainers.train.loop"),
    # These are imported where they are first needed, by us and by libraries.
    *("alembic.command", "mlflow.store.tracking.sqlalchemy_store", "sqlalchemy.dialects.sqlite"),
    *("deepspeed", "deepspeed.module_inject.auto_ep_layer", "matplotlib.figure", "scipy.stats", "typeguard"),
    *("pandas.io.formats.csvs", "pyarrow.dataset", "pyarrow.pandas_compat", "torch.utils.serialization"),
)
# transformers imports these when they are first named.
CLASSES = ("AutoModelForCausalLM", "AutoTokenizer", "LlamaForCausalLM", "LlamaForSequenceClassification")

torch.set_num_threads(1)
for module in MODULES:
    importlib.import_module(module)
for name in CLASSES:
    getattr(transformers, name)
reward_types()
