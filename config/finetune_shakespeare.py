# Continues GPT-2 XL on Shakespeare, as nanoGPT does. Needs the weights from the Hugging Face hub,
# or a folder of them.
#
#   python data/shakespeare/prepare.py
#   python train.py config/finetune_shakespeare.py --init_from=gpt2          # the 124M model
#
# Batch: 1 sequence x 1024 tokens x 32 micro-steps = 32,768 tokens per iteration; the text is
# 301,966 tokens, 9.2 iterations. Memory: 16 bytes for each of 1.56 B parameters = 24.9 GB and
# activations; with gpt2, 2.0 GB. Expect the validation loss to fall from the first evaluation on;
# this recipe has not been run here with the real weights yet.

out_dir = 'out-shakespeare'
init_from = 'gpt2-xl'
dataset = 'shakespeare'

batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False
