"""The version of each stage, raised by hand when its mathematics changes: every key of the stage changes with it.

tests/trainers/test_golden.py fails when an output changes and its version does not.

Interfaces of libraries that this package uses though they are private:

    DeepSpeed 0.19.8
      deepspeed.comm.torch.build_shm_op      replaced: it would compile an op for 45-100 s that gloo does without (engine)
      deepspeed.comm.comm.cdb                reset: else the next training of a reused process finds the last one's (engine)
      parameter.ds_id, parameter.ds_numel    whether ZeRO-3 has partitioned a parameter, and its whole size (saving, checkpoints)
      data_types.grad_accum_dtype            with bf16 it chooses BF16_Optimizer at ZeRO-1, which the memory model counts (engine)
    torch 2.13
      torch._dynamo.config.specialize_float  a soft-cap is a constant of FlexAttention's graphs (attention)
      aten._flash_attention_forward, _backward  torch.nn.attention.varlen calls them, and saves what it need not (attention)
    transformers 5.23
      masking_utils.causal_mask_function     recognised, so that plain causal attention takes the fast kernel (attention)
      config._attn_implementation            no public name for the attention that a model runs with (layouts)
      model._from_config                     builds a class of ours without weights; Auto classes do it publicly (loading)
      model._supports_attention_backend      whether a model's attention can be replaced at all (layouts)
      layer._gradient_checkpointing_func     wrapped, so that a recomputed layer stays in evaluation mode (engine)
      model._auto_class, custom_object_save  trusted code is saved with its weights, without what save_pretrained refuses (saving)
      config._experts_implementation_internal  torch's grouped product of experts knows no float64 (tiny_copy)
      models/auto/auto_mappings.py           read as text: importing the library takes seconds (folders)
"""

PREPARE = 2
CONVERT = 2
REFERENCE = 1
TRAIN = 2
EVALUATE = 2
SAMPLE = 2
