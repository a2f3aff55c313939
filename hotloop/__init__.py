"""hotloop: language-model pretraining experiments on one GPU, with an agent as the researcher.

Everything is imported as `hotloop.*`. In a checkout the folders themselves stand beside this one, which links to them;
installed, they are inside of it.
"""
