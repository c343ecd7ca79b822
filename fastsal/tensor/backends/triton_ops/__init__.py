"""The Triton kernels: a file for each operator, with its kernels and the function `launch` that runs them.

A reduction over the D columns of a row has one tree, which depends on D, the dtype and the norm alone. The row is cut into
segments of a fixed width. In each segment a block of lanes takes every BLOCK_D-th entry, and the lanes are added two by two
(`tree_sum`): this is the segment's partial result. A second step combines the partials of a row. How many rows a program takes
changes no bit.

Sizes are those of a Jacobian [B, n, D]: `n_examples`, `n_rows` (one row a class) and `n_cols`, and `n_segments` of a row;
`stride_jacobian_b` and `stride_jacobian_n` are its strides of B and n. A block is what one program takes at a time: BLOCK_ROWS
rows by BLOCK_D columns, BLOCK_N classes, BLOCK_B examples or BLOCK_S segments. Q is the code of the gradients' norm, 2, 1 or 0
for infinity, and P likewise that of the norm of x. In names, `g` is the winner's row, `d` a difference of two rows (g† where it
is the winner's minus the runner-up's), and `e_` an exponent that scales a vector into range. Program ids become int64 before
they multiply a stride.
"""
