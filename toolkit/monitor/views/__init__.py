"""The parts of the page, each drawn by one function.

Law: what a part shows comes from one snapshot, what goes wrong in a part becomes a sentence in
its place, and no name, path or reason is ever read as markdown or HTML.
"""
