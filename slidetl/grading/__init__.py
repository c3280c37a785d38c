"""A model file and a slide: the grade, the map, and the report."""
