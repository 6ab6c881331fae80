// XLA handlers of attention on the CPU: buffers -> params -> cpu/.
#include "attention/check.h"
#include "attention/cpu/schedule.h"
#include "attention/handlers.h"

namespace jax_flash::attention {
namespace {

ffi::Error forward(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key,
                   ffi::AnyBuffer value, ffi::AnyBuffer query_lengths, ffi::AnyBuffer key_lengths,
                   ffi::AnyBuffer causal_offset, ffi::AnyBuffer dropout_state,
                   ffi::AnyBuffer head_ids, ffi::AnyBuffer block_mask,
                   ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> lse,
                   ffi::Dictionary attributes) {
  ForwardParams params;
  JAX_FLASH_RETURN_IF_ERROR(decode_forward({query, key, value, query_lengths, key_lengths,
                                            causal_offset, dropout_state, head_ids, block_mask},
                                           attributes, *out, *lse, params));
  return cpu::run_forward(params, pool);
}

ffi::Error backward(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer key,
                    ffi::AnyBuffer value, ffi::AnyBuffer out, ffi::AnyBuffer lse,
                    ffi::AnyBuffer dout, ffi::AnyBuffer dlse, ffi::AnyBuffer query_lengths,
                    ffi::AnyBuffer key_lengths, ffi::AnyBuffer causal_offset,
                    ffi::AnyBuffer dropout_state, ffi::AnyBuffer head_ids,
                    ffi::AnyBuffer block_mask, ffi::Result<ffi::AnyBuffer> dq,
                    ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv,
                    ffi::Result<ffi::AnyBuffer> workspace, ffi::Dictionary attributes) {
  BackwardParams params;
  JAX_FLASH_RETURN_IF_ERROR(decode_backward({query, key, value, query_lengths, key_lengths,
                                             causal_offset, dropout_state, head_ids, block_mask},
                                            {out, lse, dout, dlse, *dq, *dk, *dv, *workspace},
                                            attributes, params));
  return cpu::run_backward(params, pool);
}

}  // namespace
}  // namespace jax_flash::attention

XLA_FFI_DEFINE_HANDLER_SYMBOL(AttentionForward, jax_flash::attention::forward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // query
                                  .Arg<xla::ffi::AnyBuffer>()  // key
                                  .Arg<xla::ffi::AnyBuffer>()  // value
                                  .Arg<xla::ffi::AnyBuffer>()  // query_lengths
                                  .Arg<xla::ffi::AnyBuffer>()  // key_lengths
                                  .Arg<xla::ffi::AnyBuffer>()  // causal_offset
                                  .Arg<xla::ffi::AnyBuffer>()  // dropout_state
                                  .Arg<xla::ffi::AnyBuffer>()  // head_ids
                                  .Arg<xla::ffi::AnyBuffer>()  // block_mask
                                  .Ret<xla::ffi::AnyBuffer>()  // out
                                  .Ret<xla::ffi::AnyBuffer>()  // lse
                                  .Attrs());

XLA_FFI_DEFINE_HANDLER_SYMBOL(AttentionBackward, jax_flash::attention::backward,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // query
                                  .Arg<xla::ffi::AnyBuffer>()  // key
                                  .Arg<xla::ffi::AnyBuffer>()  // value
                                  .Arg<xla::ffi::AnyBuffer>()  // out
                                  .Arg<xla::ffi::AnyBuffer>()  // lse
                                  .Arg<xla::ffi::AnyBuffer>()  // dout
                                  .Arg<xla::ffi::AnyBuffer>()  // dlse
                                  .Arg<xla::ffi::AnyBuffer>()  // query_lengths
                                  .Arg<xla::ffi::AnyBuffer>()  // key_lengths
                                  .Arg<xla::ffi::AnyBuffer>()  // causal_offset
                                  .Arg<xla::ffi::AnyBuffer>()  // dropout_state
                                  .Arg<xla::ffi::AnyBuffer>()  // head_ids
                                  .Arg<xla::ffi::AnyBuffer>()  // block_mask
                                  .Ret<xla::ffi::AnyBuffer>()  // dq or dqkv
                                  .Ret<xla::ffi::AnyBuffer>()  // dk or dkv
                                  .Ret<xla::ffi::AnyBuffer>()  // dv
                                  .Ret<xla::ffi::AnyBuffer>()  // workspace
                                  .Attrs());
