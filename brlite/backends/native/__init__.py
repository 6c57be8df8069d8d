"""The native backend: C++ kernels behind a plain C interface; how they are built, loaded, planned for and fed with
packed weights. First file: `backend.py`.
"""
