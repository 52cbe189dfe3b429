"""A miniature of post-training on verified solutions: a family of programming problems, a tiny hybrid model, execution.

Everything fits on one CPU core: `task` writes the problems and the corpus, `pretrain` trains the base model on it,
`base` loads it, `evaluate` generates with a model, `execute` decides whether a program is right by running it, and
`sample` collects right and wrong programs of the model's own.
"""
