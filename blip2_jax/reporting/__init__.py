"""Self-contained pages: a run, a sweep, a prepared data set.

Everything is inside a page (pictures as data, curves as SVG, no scripts), so that it opens
offline and can be mailed.
"""
