"""One runnable document per result: python -m experiments.t5_pretrain"""
