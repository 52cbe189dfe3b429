"""The paper's main table in miniature: tiny hybrids, ten seeds, every method tuned alike, on two CPU cores.

`plan` says what is compared, `work` does it, `run` is the command, `report` writes tables, figures and the page.
"""
