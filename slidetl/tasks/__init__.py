"""How a network is trained and tested: LightningModules, and what they write."""
