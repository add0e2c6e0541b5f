# Evaluates OpenAI's GPT-2 124M on OpenWebText and exits.
#
#   python train.py config/eval_gpt2.py
#
# 500 batches of 8 sequences x 1024 tokens = 4.1 M tokens of each split. Memory: 0.5 GB of weights,
# activations of one batch.

init_from = 'gpt2'
eval_only = True
eval_iters = 500
batch_size = 8
