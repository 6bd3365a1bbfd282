// Arguments of a call as types, for the std::visit that chooses the instance of a template.
#pragma once

#include <type_traits>
#include <variant>

#include "core/arithmetic.h"

namespace ncsr {

inline std::variant<float, double> scalar(bool float64) {
    if (float64) return double();
    return float();
}

inline std::variant<std::false_type, std::true_type> direction(bool inverse) {
    if (inverse) return std::true_type();
    return std::false_type();
}

inline std::variant<Affine, Gaussian> map_type(Map map) {
    if (map == Map::affine) return Affine();
    return Gaussian();
}

}  // namespace ncsr
