"""Plain modules that turn tiles into a grade. They know no trainer, open no slide, and script."""
