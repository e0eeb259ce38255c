"""Engines behind one interface: `base` defines it, `registry` lists the backends, `select` picks and loads one.

Each engine library is imported only when an engine of it is checked or opened.
"""
