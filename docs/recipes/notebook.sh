# All cells in order, in a kernel of this environment, from another folder than the repository's.
PYTHONPATH=$PWD exec python docs/recipes/run_notebook.py
