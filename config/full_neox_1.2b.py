# GPT-NeoX at 1.41 B parameters: 24 layers, 2048 wide, parallel residual, RoPE on a quarter of each
# head.
#
#   python train.py config/full_neox_1.2b.py --max_iters=10 --compile=False          # smoke test
#   torchrun --standalone --nproc_per_node=8 train.py config/full_neox_1.2b.py \
#     --total_batch_size=2097152
#
# Parameters: 1,414,455,296. Memory: float32 weights, gradients and two AdamW moments take 16 bytes
# each, 22.6 GB on every GPU under DDP; activations come on top and grow with batch_size: lower it
# (and raise gradient_accumulation_steps by the same factor) when memory runs out.
# Batch: 8 sequences x 2048 tokens x 16 micro-steps = 262,144 tokens per iteration on each GPU;
# 25,000 iterations on one GPU are 6.6 B tokens. total_batch_size fixes the batch for any number of
# GPUs.
# Data: OpenWebText with the GPT-2 tokenizer, `python data/openwebtext/prepare.py`.
# Expect a first loss of ln(50257) = 10.8 and up to half of one more.
# No full run of this recipe has been made yet.

out_dir = 'out-neox-1.2b'
dataset = 'openwebtext'

arch_preset = 'neox'
n_layer = 24
n_head = 16
n_embd = 2048
d_ff = 8192
vocab_size = 50257
block_size = 2048

batch_size = 8
gradient_accumulation_steps = 16

learning_rate = 3e-4
min_lr = 3e-5
max_iters = 25000
lr_decay_iters = 25000

eval_interval = 1000
eval_iters = 50
eval_at_start = False
log_interval = 10
