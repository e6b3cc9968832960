"""How the embedded demo model is made: clips, networks, training, evaluation, export. Start with train.py."""
