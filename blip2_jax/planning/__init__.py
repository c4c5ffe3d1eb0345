"""What a run would need on TPUs that are not there: memory, time, and the best mesh.

`topology` names slices, `compilation` compiles a recipe's train step for one, `hlo` counts what the
compiled program does, `estimate` makes a plan of that, `candidates` varies the recipe, `search`
ranks plans of several meshes, and `text` prints them. `chips` is the table of what accelerators can
do.
"""
