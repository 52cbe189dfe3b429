"""A miniature of post-training on verified solutions: a family of programming problems, a tiny hybrid model, execution.

Everything fits on one CPU core: `task` writes the problems and the corpus, `pretrain` trains the base model on it,
`evaluate` samples from a model, and `execute` decides whether a sampled program is right by running it.
"""
