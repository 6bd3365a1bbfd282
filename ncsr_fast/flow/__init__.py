"""A flow's modules: the parameters of its levels and networks, their initialisation and their reference."""
