"""The library of models: what one laboratory trained is where the next begins. See docs/design/zoo.md."""
