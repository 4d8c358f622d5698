;; A plugin in the text form of WebAssembly: small enough to read, and it needs no compiler. Requests get the field X-Mark
;; with the plugin's configuration; those with the field X-Block are answered with 403. Plugins are written in Rust, Go
;; or C++ otherwise: docs/wasm.md.
(module
  (import "env" "proxy_get_configuration" (func $get_configuration (param i32 i32) (result i32)))
  (import "env" "proxy_get_header_map_value" (func $get_field (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_replace_header_map_value" (func $set_field (param i32 i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_send_local_response" (func $answer (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))

  (memory (export "memory") 1)
  (data (i32.const 16) "x-mark")
  (data (i32.const 24) "x-block")
  (data (i32.const 32) "blocked by a module\n")

  ;; At 0 and 4 the host writes where a value is and how long. The heap is everything from 1024 on.
  (global $heap (mut i32) (i32.const 1024))
  (global $mark (mut i32) (i32.const 0))
  (global $mark_length (mut i32) (i32.const 0))

  (func (export "proxy_abi_version_0_2_0"))

  ;; Memory for what the host hands over. Values of requests are all read before the next is asked for.
  (func (export "proxy_on_memory_allocate") (param $size i32) (result i32)
    (local $place i32)
    (local.set $place (global.get $heap))
    (global.set $heap (i32.add (local.get $place) (local.get $size)))
    (if (i32.gt_u (global.get $heap) (i32.const 65536)) (then (unreachable)))
    (local.get $place))

  ;; The configuration stays at the beginning of the heap; here one object has the plugin.
  (func (export "proxy_on_configure") (param $root i32) (param $size i32) (result i32)
    (drop (call $get_configuration (i32.const 0) (i32.const 4)))
    (global.set $mark (i32.load (i32.const 0)))
    (global.set $mark_length (i32.load (i32.const 4)))
    (i32.const 1))

  (func (export "proxy_on_request_headers") (param $context i32) (param $count i32) (param $end i32) (result i32)
    (global.set $heap (i32.add (global.get $mark) (global.get $mark_length)))
    (if (i32.eqz (call $get_field (i32.const 0) (i32.const 24) (i32.const 7) (i32.const 0) (i32.const 4)))
      (then
        (drop (call $answer (i32.const 403) (i32.const 0) (i32.const 0)
          (i32.const 32) (i32.const 20) (i32.const 0) (i32.const 0) (i32.const -1)))
        ;; Paused: it is answered.
        (return (i32.const 1))))
    (drop (call $set_field
      (i32.const 0) (i32.const 16) (i32.const 6) (global.get $mark) (global.get $mark_length)))
    (i32.const 0)))
