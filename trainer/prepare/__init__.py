"""``python -m trainer prepare SOURCE... --out DIR``: a folder of meshes becomes packed training data and a report."""
