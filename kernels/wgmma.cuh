// The forms of wgmma that the kernels use: d = A B^T, or d += A B^T where keep is not 0, over one slab of k.
//
// A: 64 rows, in registers (one uint4 a lane) or a slab of 64 rows; B: a slab of N rows, N = 8 * the n-tiles of d. A slab
// is 16 channels of bf16, or 32 of s8 with 32-bit integer sums, or 32 of e4m3 (product8). Lists of operands are spelled
// out, as the assembler wants.
#pragma once

#define BITDGDM_R0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define BITDGDM_R1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define BITDGDM_R2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define BITDGDM_R3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define BITDGDM_R4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define BITDGDM_R5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define BITDGDM_R6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define BITDGDM_R7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define BITDGDM_R0_7 "%0, %1, %2, %3, %4, %5, %6, %7"
#define BITDGDM_R32 BITDGDM_R0 ", " BITDGDM_R1
#define BITDGDM_R64 BITDGDM_R32 ", " BITDGDM_R2 ", " BITDGDM_R3
#define BITDGDM_R128 BITDGDM_R64 ", " BITDGDM_R4 ", " BITDGDM_R5 ", " BITDGDM_R6 ", " BITDGDM_R7
#define BITDGDM_D4(c, i) c(d[i][0]), c(d[i][1]), c(d[i][2]), c(d[i][3])
#define BITDGDM_D8(c, i) BITDGDM_D4(c, i), BITDGDM_D4(c, i + 1)
#define BITDGDM_D16(c, i) BITDGDM_D8(c, i), BITDGDM_D8(c, i + 2)
#define BITDGDM_D32(c, i) BITDGDM_D16(c, i), BITDGDM_D16(c, i + 4)
#define BITDGDM_D64(c, i) BITDGDM_D32(c, i), BITDGDM_D32(c, i + 8)
#define BITDGDM_D128(c, i) BITDGDM_D64(c, i), BITDGDM_D64(c, i + 16)

// in: A and B operands and the predicate by number, after N / 2 results
#define BITDGDM_FORMS(NAME, T, c, N, SHAPE, TAIL_R, TAIL_S, R, D, A0, A1, A2, A3, B, P, AS, BS, PS)                              \
  DEV void NAME(T (&d)[N / 8][4], const uint4& a, u64 b, int keep) {                                                   \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N SHAPE " {" R       \
                 "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p" TAIL_R ";\n}"                                  \
                 : D(c, 0) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(b), "r"(keep));                                  \
  }                                                                                                                       \
  DEV void NAME(T (&d)[N / 8][4], u64 a, u64 b, int keep) {                                                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #PS ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N SHAPE " {" R      \
                 "}, %" #AS ", %" #BS ", p" TAIL_S ";\n}"                                                                 \
                 : D(c, 0) : "l"(a), "l"(b), "r"(keep));                                                                  \
  }
#define BITDGDM_ALL(N, R, D, ...)                                                                                        \
  BITDGDM_FORMS(product, float, "+f", N, "k16.f32.bf16.bf16", ", 1, 1, 0", ", 1, 1, 0, 0", R, D, __VA_ARGS__)                       \
  BITDGDM_FORMS(product, int, "+r", N, "k32.s32.s8.s8", "", "", R, D, __VA_ARGS__) \
  BITDGDM_FORMS(product8, float, "+f", N, "k32.f32.e4m3.e4m3", ", 1, 1", ", 1, 1", R, D, __VA_ARGS__)

BITDGDM_ALL(256, BITDGDM_R128, BITDGDM_D128, 128, 129, 130, 131, 132, 133, 128, 129, 130)
BITDGDM_ALL(128, BITDGDM_R64, BITDGDM_D64, 64, 65, 66, 67, 68, 69, 64, 65, 66)
BITDGDM_ALL(64, BITDGDM_R32, BITDGDM_D32, 32, 33, 34, 35, 36, 37, 32, 33, 34)
BITDGDM_ALL(32, BITDGDM_R0, BITDGDM_D16, 16, 17, 18, 19, 20, 21, 16, 17, 18)
BITDGDM_ALL(16, BITDGDM_R0_7, BITDGDM_D8, 8, 9, 10, 11, 12, 13, 8, 9, 10)
