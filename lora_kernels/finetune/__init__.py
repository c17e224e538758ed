"""The command `python -m lora_kernels finetune`: a LoRA or QLoRA fine-tune from data to a checked adapter."""
