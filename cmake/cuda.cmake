# _cuda: built where an nvcc is found.
