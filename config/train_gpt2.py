# GPT-2 124M on OpenWebText, nanoGPT's recipe.
#
#   python data/openwebtext/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
#
# Parameters: 124.4 M. Memory: float32 weights, gradients and AdamW moments take 2.0 GB on every
# GPU; activations on top. Batch: 491,520 tokens per iteration on any number of GPUs: 12 sequences x
# 1024 tokens x 40 micro-steps on one GPU, x 5 on each of eight (nanoGPT writes
# gradient_accumulation_steps = 5 * 8 and divides by the GPUs; here that key counts per GPU).
# 600,000 iterations are 295 B tokens. Expect a first loss near ln(50304) = 10.8; nanoGPT reports
# 2.85 at the end.

out_dir = 'out-gpt2-124m'
dataset = 'openwebtext'

batch_size = 12
block_size = 1024
total_batch_size = 491520


eval_interval = 1000
eval_iters = 200
log_interval = 10
