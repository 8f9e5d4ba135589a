"""What every life of a command would import first: paid once, in the fork server, instead of seconds in each life."""

import deepspeed
import torch
import transformers

import orchestrator.commands
import orchestrator.inline
import orchestrator.tracking
import trainers.evaluate
import trainers.tiny
import trainers.train

assert deepspeed and orchestrator and trainers
torch.set_num_threads(1)
# Lazily imported by name otherwise.
assert transformers.AutoModelForCausalLM and transformers.LlamaForCausalLM
assert transformers.LlamaForSequenceClassification and transformers.AutoTokenizer
