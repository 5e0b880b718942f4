// GELU, exact and tanh, for sixteen lanes: x Phi(x) = max(x, 0) - a Q(a) with a = |x| and Q the upper tail.
//
// Q is a polynomial of degree 5 in each of 16 pieces of [0, 6), fitted to the definition (least squares reweighted
// towards minimax, error 5e-9); one permutation of a register of 16 picks each coefficient. About a third of the
// instructions of the general formula in gelu.inl, without its division. The error is absolute, at most 8e-8 |x|,
// which is what 0.5 x (1 + erf) in float32 has as well; beyond 6 the answer is x or about -6e-9.

namespace {

constexpr float kGeluEnd = 5.99f;
constexpr float kGeluPieces = 15.5f / 6.f;  // per unit of a; piece i is centred on i

alignas(64) constexpr float kGeluTail[6][16] = {
    {0.5f, 0.349342287f, 0.219408169f, 0.122761928f,
     0.0607645623f, 0.02646547f, 0.0101008443f, 0.00336743332f,
     0.00097819441f, 0.000247109157f, 5.42022462e-05f, 1.03102957e-05f,
     1.69907764e-06f, 2.42374e-07f, 2.99084775e-08f, 3.19074589e-09f},
    {-0.154429272f, -0.143281922f, -0.114439741f, -0.0786839053f,
     -0.0465713218f, -0.0237287469f, -0.0104076974f, -0.0039296886f,
     -0.00127727748f, -0.000357384852f, -8.60817236e-05f, -1.78488372e-05f,
     -3.18590901e-06f, -4.89532795e-07f, -6.47523848e-08f, -7.37320205e-09f},
    {-6.17984099e-08f, 0.0107346466f, 0.0171477478f, 0.0176853258f,
     0.0139569547f, 0.00888918433f, 0.00467869174f, 0.00206096075f,
     0.000765550823f, 0.000240962152f, 6.44813335e-05f, 1.47046485e-05f,
     2.86263321e-06f, 4.76363425e-07f, 6.78288927e-08f, 8.27070856e-09f},
    {0.00385720329f, 0.00304207066f, 0.00114502897f, -0.000684926636f,
     -0.00162534846f, -0.00162734627f, -0.0011422215f, -0.000622457301f,
     -0.000274015445f, -9.9402605e-05f, -3.00608735e-05f, -7.63465869e-06f,
     -1.63659661e-06f, -2.97176172e-07f, -4.58310332e-08f, -6.01530559e-09f},
    {-1.66314533e-06f, -0.000378678873f, -0.00051030115f, -0.000363315601f,
     -0.00010604514f, 8.10703277e-05f, 0.00013880698f, 0.000111530309f,
     6.3194253e-05f, 2.77259187e-05f, 9.7868824e-06f, 2.83542931e-06f,
     6.82321854e-07f, 1.37448382e-07f, 2.330356e-08f, 3.33848416e-09f},
    {-8.44806345e-05f, -5.65179726e-05f, 4.81746065e-06f, 4.76402602e-05f,
     4.88035876e-05f, 2.42010992e-05f, 6.98603515e-07f, -9.32532839e-06f,
     -8.9102632e-06f, -5.19470632e-06f, -2.23547795e-06f, -7.5549849e-07f,
     -2.0644751e-07f, -4.63714755e-08f, -8.65114025e-09f, -1.35004619e-09f},
};

alignas(64) constexpr float kGeluTanhTail[6][16] = {
    {0.5f, 0.349359453f, 0.219506413f, 0.122937649f,
     0.0608961508f, 0.026443528f, 0.00994885806f, 0.00319282059f,
     0.000857322535f, 0.00018841229f, 3.30969451e-05f, 4.53487837e-06f,
     4.72832085e-07f, 3.6597072e-08f, 2.05126427e-09f, 8.12248671e-11f},
    {-0.154429272f, -0.143234074f, -0.114338383f, -0.0786539987f,
     -0.0466871522f, -0.0238940902f, -0.0104873152f, -0.00390231749f,
     -0.00120982702f, -0.000305822294f, -6.15374593e-05f, -9.61437672e-06f,
     -1.13746853e-06f, -9.93969707e-08f, -6.25848884e-09f, -2.77034673e-10f},
    {-6.47159339e-08f, 0.0107735852f, 0.0171489082f, 0.017617587f,
     0.0138960574f, 0.00890387595f, 0.00473819161f, 0.00210050121f,
     0.000767802703f, 0.000227080265f, 5.30835277e-05f, 9.56637268e-06f,
     1.29602688e-06f, 1.28741377e-07f, 9.14711418e-09f, 4.53453802e-10f},
    {0.00387631543f, 0.00304382993f, 0.00112096942f, -0.00069948379f,
     -0.00160683261f, -0.00160221371f, -0.00113936921f, -0.000635297154f,
     -0.000283745379f, -0.000100803649f, -2.79456108e-05f, -5.90616492e-06f,
     -9.28879444e-07f, -1.06131338e-07f, -8.60193961e-09f, -4.82881402e-10f},
    {-1.74157344e-06f, -0.000385962194f, -0.000513407751f, -0.000356101198f,
     -9.9627694e-05f, 7.79417678e-05f, 0.000132833724f, 0.000110216475f,
     6.52530071e-05f, 2.93324574e-05f, 1.00314519e-05f, 2.57072679e-06f,
     4.84010059e-07f, 6.55792789e-08f, 6.26154817e-09f, 4.12456153e-10f},
    {-8.6358421e-05f, -5.70432458e-05f, 6.84176894e-06f, 4.90076309e-05f,
     4.72368738e-05f, 2.25933418e-05f, 1.15518515e-06f, -8.27816621e-06f,
     -8.67903691e-06f, -5.48204616e-06f, -2.43500631e-06f, -7.76889578e-07f,
     -1.76981317e-07f, -2.84039192e-08f, -3.15957704e-09f, -2.39256753e-10f},
};

inline F32 gelu_by_table(F32 x, const float (*tail)[16]) {
  const F32 a = min_keep(splat(kGeluEnd), absolute(x));
  const F32 scaled = mul(a, splat(kGeluPieces));
  // Adding 1.5 * 2^23 leaves the number of the nearest piece in the low bits.
  const F32 shifted = add(scaled, splat(12582912.f));
  const F32 t = sub(scaled, sub(shifted, splat(12582912.f)));
  const __m512i piece = _mm512_castps_si512(shifted);
  F32 q = _mm512_permutexvar_ps(piece, _mm512_load_ps(tail[5]));
  q = fma(q, t, _mm512_permutexvar_ps(piece, _mm512_load_ps(tail[4])));
  q = fma(q, t, _mm512_permutexvar_ps(piece, _mm512_load_ps(tail[3])));
  q = fma(q, t, _mm512_permutexvar_ps(piece, _mm512_load_ps(tail[2])));
  q = fma(q, t, _mm512_permutexvar_ps(piece, _mm512_load_ps(tail[1])));
  q = fma(q, t, _mm512_permutexvar_ps(piece, _mm512_load_ps(tail[0])));
  return _mm512_fnmadd_ps(a, q, max_keep(splat(0.f), x));
}

inline F32 gelu(F32 x) { return gelu_by_table(x, kGeluTail); }
inline F32 gelu_tanh(F32 x) { return gelu_by_table(x, kGeluTanhTail); }

}  // namespace
