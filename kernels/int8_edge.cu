// int4_edge.cu for inputs of 5 to 8 bit.
#define BYTES 1
#include "int4_edge.cu"
