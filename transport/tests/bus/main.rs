//! What every bus must do, run on each of them, and what the in-memory one does wrong on request.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod conformance;
mod dead_letters;
mod faults;
mod outages;
mod proxy;
mod rpc;
mod scene;
mod subscriptions;

use scene::{InMemory, Scene};

/// Runs every conformance case on one kind of broker.
macro_rules! conformance {
    ($broker:ident, $world:expr, [$($module:ident: $($case:ident),* $(,)?;)*]) => {
        mod $broker {
            use super::*;
            $($(
                #[tokio::test]
                async fn $case() {
                    $module::$case(&Scene::new($world)).await;
                }
            )*)*
        }
    };
}

/// The same cases as values, for a broker that they share because it takes long to start.
macro_rules! cases {
    ($world:expr, [$($module:ident: $($case:ident),* $(,)?;)*]) => {
        vec![$($(
            {
                let scene = Scene::new($world);
                Case::new(stringify!($case), async move { $module::$case(&scene).await })
            },
        )*)*]
    };
}

/// The list of cases, once for all brokers.
macro_rules! all_cases {
    ($macro:ident, $($head:tt)*) => {
        $macro! { $($head)* [
            conformance:
                everything_that_was_published_arrives,
                a_message_that_no_queue_takes_is_returned,
                concurrent_publishes_get_their_own_answers,
                a_missing_exchange_is_named_and_nothing_else_breaks,
                topic_patterns_select,
                direct_keys_select,
                two_bindings_bring_one_copy,
                order_per_key_is_kept,
                declaring_again_changes_nothing,
                declaring_otherwise_is_a_conflict,
                missing_queues_are_named,
                impossible_names_and_sizes_are_refused,
                a_queue_belongs_to_all_bindings;
            subscriptions:
                prefetch_bounds_what_is_out,
                consumers_share_a_queue,
                consumers_with_room_take_turns,
                what_is_requeued_takes_its_old_place,
                what_a_consumer_leaves_comes_again,
                what_a_connection_leaves_comes_again,
                a_taken_delivery_outlives_its_consumer,
                untaken_deliveries_go_back_when_cancelled,
                a_future_that_is_dropped_loses_nothing,
                an_exclusive_queue_is_of_its_connection,
                an_exclusive_queue_goes_with_its_last_consumer,
                deleting_a_queue_ends_its_consumers,
                a_connection_closes_with_its_last_clone,
                a_closed_connection_says_so;
            dead_letters:
                rejected_messages_are_dead_lettered,
                acked_messages_are_not_dead_lettered,
                the_delivery_limit_ends_a_poison_message,
                a_full_queue_rejects,
                a_full_queue_drops_its_head,
                a_byte_cap_drops_the_head,
                expired_messages_are_dead_lettered,
                a_circle_of_dead_letters_ends;
            rpc:
                a_call_is_answered,
                concurrent_calls_get_their_own_replies,
                a_call_that_nobody_serves_fails_at_once,
                a_call_without_reply_ends_in_time,
                a_late_reply_disturbs_nobody,
                a_message_that_is_no_call_cannot_be_answered;
        ] }
    };
}

all_cases!(conformance, memory, InMemory::new(),);

mod broker;
