# A mixture of experts of 60 million parameters: one layer, 4 experts of which a token goes to 2,
# and one that all go to.
#
#   python data/codeparrot_starcoder2/prepare.py
#   python train.py config/moe_60m.py
#
# Parameters: 60,820,992 (vocabulary 49,152 twice, 50.3 M; 5 experts of width 1280, 9.8 M),
# 56,888,832 of them active for each token.
# Memory: 4.0 GB on a CPU with batch_size=1 and float32.
# Batch: 8 sequences x 2048 tokens x 8 micro-steps = 131,072 tokens per iteration; 20000 iterations
# are 2.6 B tokens.
# Expect the load score in the log (100 x least / most tokens of an expert) to begin near 0 on text
# and to rise while the balancing bias moves; what loss
#   it reaches was not measured.

out_dir = 'out-moe-60m'
dataset = 'codeparrot_starcoder2'

arch_preset = 'moe'
n_layer = 1
n_head = 8
num_key_value_heads = 2
n_embd = 512
vocab_size = 49152
block_size = 2048
num_experts = 4
num_experts_per_tok = 2
num_shared_experts = 1
expert_d_ff = 1280

batch_size = 8
gradient_accumulation_steps = 8

learning_rate = 6e-4
min_lr = 6e-5
warmup_iters = 500
max_iters = 20000
lr_decay_iters = 20000

eval_interval = 1000
eval_iters = 50
log_interval = 10
eval_at_start = False
