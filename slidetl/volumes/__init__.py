"""Volumes: CT series in Hounsfield units on a grid in patient coordinates. :func:`read_volume` reads them."""
