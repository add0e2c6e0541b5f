# A mixture of experts of 0.8 billion parameters: 16 layers, 8 experts of which a token goes to 2,
# and one that all go to.
#
#   python data/codeparrot_starcoder2/prepare.py
#   torchrun --standalone --nproc_per_node=8 train.py config/moe_800m.py \
#     --gradient_accumulation_steps=4
#
# Parameters: 793,936,896 (0.79 B), 359,826,432 (0.36 B) of them active for each token.
# Memory: 24 GB on a CPU with batch_size=1, block_size=512 and float32; weights, gradients and
# moments are 13 GB of it.
# Batch: 8 sequences x 2048 tokens x 32 micro-steps = 524,288 tokens per iteration; 30000 iterations
# are 15.7 B tokens.
# Expect 2.26 GFLOP per token of training; what loss it reaches was not measured. For a longer
# context export it, then train on from the folder with
#   --init_from=FOLDER --block_size=8192 --rope_scaling=yarn --rope_factor=4.

out_dir = 'out-moe-800m'
dataset = 'codeparrot_starcoder2'

arch_preset = 'moe'
n_layer = 16
n_head = 16
num_key_value_heads = 4
n_embd = 1024
vocab_size = 49152
block_size = 2048
num_experts = 8
num_experts_per_tok = 2
num_shared_experts = 1
expert_d_ff = 1472

batch_size = 8
gradient_accumulation_steps = 32

learning_rate = 4e-4
min_lr = 4e-5
warmup_iters = 1000
max_iters = 30000
lr_decay_iters = 30000

eval_interval = 1000
eval_iters = 50
log_interval = 10
eval_at_start = False
