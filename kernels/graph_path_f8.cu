// graph_path.cu with 8-bit floats.
#define FP8 1
#include "graph_path.cu"
