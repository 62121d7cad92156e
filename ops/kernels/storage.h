// How kernels see Jittor's arrays: 16-bit floats as their bits. Of all bodies.
#pragma once

#include <stdint.h>

namespace gorgon {

template <class T> struct storage { typedef uint16_t type; };
template <> struct storage<float> { typedef float type; };
template <> struct storage<int8_t> { typedef int8_t type; };
template <> struct storage<uint8_t> { typedef uint8_t type; };
template <class T> inline typename storage<T>::type* raw(T* p) { return (typename storage<T>::type*)p; }

}  // namespace gorgon
