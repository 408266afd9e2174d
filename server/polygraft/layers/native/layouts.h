// How the structures that Python shares lie in memory. native/structures.py compares this with its own
// declarations when the library is loaded.

#pragma once

#include <cstddef>
#include <string>

#include "decoder_layer.h"

namespace {

// A line "name offset size" for each structure and each of its fields.
inline std::string describe_layouts() {
  std::string text;
  auto line = [&](const char* name, size_t offset, size_t size) {
    text += std::string(name) + ' ' + std::to_string(offset) + ' ' + std::to_string(size) + '\n';
  };
#define STRUCTURE(S) line(#S, 0, sizeof(S))
#define FIELD(S, field) line(#S "." #field, offsetof(S, field), sizeof(S::field))
  STRUCTURE(Plan);
  FIELD(Plan, slot_mapping);
  FIELD(Plan, query_start);
  FIELD(Plan, context_lens);
  FIELD(Plan, prefix_lens);
  FIELD(Plan, block_tables);
  FIELD(Plan, max_blocks);
  FIELD(Plan, num_sequences);
  FIELD(Plan, num_rows);
  FIELD(Plan, bare);
  FIELD(Plan, num_layers);
  STRUCTURE(Layer);
  FIELD(Layer, key_cache);
  FIELD(Layer, value_cache);
  FIELD(Layer, heads);
  FIELD(Layer, kv_heads);
  FIELD(Layer, head_dim);
  FIELD(Layer, value_dim);
  FIELD(Layer, block_size);
  FIELD(Layer, window);
  FIELD(Layer, sinks);
  FIELD(Layer, scaling);
  FIELD(Layer, softcap);
  FIELD(Layer, index);
  STRUCTURE(Entry);
  FIELD(Entry, a);
  FIELD(Entry, b);
  FIELD(Entry, bias);
  FIELD(Entry, rank);
  FIELD(Entry, dtype);
  FIELD(Entry, in_scale);
  FIELD(Entry, out_scale);
  FIELD(Entry, w1);
  FIELD(Entry, w2);
  FIELD(Entry, o2);
  FIELD(Entry, i2);
  FIELD(Entry, rotation);
  FIELD(Entry, rotation_size);
  FIELD(Entry, rotation_step);
  FIELD(Entry, flags);
  FIELD(Entry, scaling);
  STRUCTURE(Weights);
  FIELD(Weights, weight);
  FIELD(Weights, scale);
  FIELD(Weights, values);
  FIELD(Weights, bias);
  FIELD(Weights, storage);
  STRUCTURE(Module);
  FIELD(Module, table);
  FIELD(Module, width);
  FIELD(Module, weights);
  STRUCTURE(Group);
  FIELD(Group, in_features);
  FIELD(Group, modules);
  FIELD(Group, module);
  STRUCTURE(Segment);
  FIELD(Segment, first);
  FIELD(Segment, last);
  FIELD(Segment, slot);
  FIELD(Segment, weight);
  FIELD(Segment, offset);
  STRUCTURE(Bottleneck);
  FIELD(Bottleneck, down);
  FIELD(Bottleneck, up);
  FIELD(Bottleneck, down_bias);
  FIELD(Bottleneck, up_bias);
  FIELD(Bottleneck, width);
  FIELD(Bottleneck, dtype);
  FIELD(Bottleneck, activation);
  FIELD(Bottleneck, reads);
  FIELD(Bottleneck, normalizes);
  FIELD(Bottleneck, residual);
  FIELD(Bottleneck, norm_weight);
  FIELD(Bottleneck, norm_bias);
  FIELD(Bottleneck, norm_skips_sum);
  FIELD(Bottleneck, norm_inside);
  FIELD(Bottleneck, scaling);
  STRUCTURE(Site);
  FIELD(Site, table);
  FIELD(Site, slots);
  STRUCTURE(Norm);
  FIELD(Norm, scale);
  FIELD(Norm, eps);
  FIELD(Norm, table);
  FIELD(Norm, slots);
  STRUCTURE(DecoderLayer);
  FIELD(DecoderLayer, attention);
  FIELD(DecoderLayer, qkv);
  FIELD(DecoderLayer, o);
  FIELD(DecoderLayer, gate_up);
  FIELD(DecoderLayer, down);
  FIELD(DecoderLayer, before_attention);
  FIELD(DecoderLayer, after_attention);
  FIELD(DecoderLayer, before_mlp);
  FIELD(DecoderLayer, after_mlp);
  FIELD(DecoderLayer, q);
  FIELD(DecoderLayer, k);
  FIELD(DecoderLayer, hidden);
  FIELD(DecoderLayer, activation);
  FIELD(DecoderLayer, attention_site);
  FIELD(DecoderLayer, mlp_site);
  STRUCTURE(Rows);
  FIELD(Rows, cos);
  FIELD(Rows, sin);
  FIELD(Rows, plan);
  FIELD(Rows, segments);
  FIELD(Rows, num_segments);
  FIELD(Rows, scratch);
  FIELD(Rows, max_rank);
  FIELD(Rows, max_width);
  FIELD(Rows, buffer);
#undef STRUCTURE
#undef FIELD
  return text;
}

}  // namespace
