"""Training over several sites: the slides stay, the network travels.

``weights``, ``combine``, ``mixing`` and ``rounds`` are the mathematics: dicts of NumPy arrays in, dicts out,
without an engine and without torch.
"""
