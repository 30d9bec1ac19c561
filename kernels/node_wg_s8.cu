// node_wg.cu with 8-bit integer products.
#define INT8 1
#include "node_wg.cu"
