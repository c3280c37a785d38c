"""The library of models on this machine: cards, trust, local files. See docs/design/zoo.md."""
