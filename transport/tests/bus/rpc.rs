//! Calls.

use std::time::Duration;

use kiln_transport::topology::Queue;
use kiln_transport::{Bus, BusError, Consumer, Message};
use uuid::Uuid;

use crate::scene::{ALPHA, Scene, World, next, number, numbered, prefetch, within};

/// Far above what a call takes.
const LONG: Duration = Duration::from_secs(20);
/// For calls that get no reply.
const SHORT: Duration = Duration::from_millis(100);

/// A caller, a server and the server's subscription.
async fn pair(scene: &Scene<impl World>) -> (Bus, Bus, Consumer) {
    let caller = scene.alpha().await;
    let server = scene.beta().await;
    let queue: Queue = scene.queue("rpc");
    server.declare(&scene.topology([queue])).await.unwrap();
    let consumer = server.consume(&scene.name("rpc"), prefetch(50)).await.unwrap();
    (caller, server, consumer)
}

async fn call(
    scene: &Scene<impl World>,
    bus: &Bus,
    request: Message,
    limit: Duration,
) -> Result<Message, BusError> {
    within(bus.call(&scene.name("x"), &scene.name("rpc"), request, limit)).await
}

fn reply(text: impl Into<String>) -> Message {
    Message::new(Uuid::now_v7(), "reply.v1", text.into())
}

pub(crate) async fn a_call_is_answered(scene: &Scene<impl World>) {
    let (caller, server, mut consumer) = pair(scene).await;
    let serve = async {
        let request = next(&mut consumer).await;
        assert_eq!(request.user_id.as_deref(), Some(ALPHA));
        assert_eq!(request.message.correlation_id, Some(request.message.message_id));
        server.reply(&request, reply("pong")).await.unwrap();
        request.ack().await.unwrap();
    };
    let request = Message::new(Uuid::now_v7(), "ping.v1", "ping");
    let id = request.message_id;
    let (answer, ()) = tokio::join!(call(scene, &caller, request, LONG), serve);
    let answer = answer.unwrap();
    assert_eq!(answer.body.as_ref(), b"pong");
    assert_eq!((answer.kind.as_str(), answer.correlation_id), ("reply.v1", Some(id)));
}

pub(crate) async fn concurrent_calls_get_their_own_replies(scene: &Scene<impl World>) {
    const CALLS: u64 = 20;
    let (caller, server, mut consumer) = pair(scene).await;
    let serve = async {
        let mut requests = Vec::new();
        for _ in 0..CALLS {
            requests.push(next(&mut consumer).await);
        }
        // The last is answered first.
        for request in requests.into_iter().rev() {
            let answer = (number(&request) * 2).to_string();
            server.reply(&request, reply(answer)).await.unwrap();
            request.ack().await.unwrap();
        }
    };
    let mut calls = tokio::task::JoinSet::new();
    for index in 0..CALLS {
        let (caller, exchange, key) = (caller.clone(), scene.name("x"), scene.name("rpc"));
        calls.spawn(async move {
            let answer = caller.call(&exchange, &key, numbered(index), LONG).await.unwrap();
            assert_eq!(answer.body.as_ref(), (index * 2).to_string().as_bytes());
        });
    }
    serve.await;
    while let Some(ended) = within(calls.join_next()).await {
        ended.unwrap();
    }
}

pub(crate) async fn a_call_that_nobody_serves_fails_at_once(scene: &Scene<impl World>) {
    let bus = scene.alpha().await;
    bus.declare(&scene.topology([])).await.unwrap();
    let error = call(scene, &bus, numbered(1), LONG).await.unwrap_err();
    assert_eq!(error, BusError::Unserved { exchange: scene.name("x"), key: scene.name("rpc") });
}

pub(crate) async fn a_call_without_reply_ends_in_time(scene: &Scene<impl World>) {
    let (caller, _server, _consumer) = pair(scene).await;
    let request = numbered(1);
    for _ in ["a call", "the same again"] {
        let error = call(scene, &caller, request.clone(), SHORT).await.unwrap_err();
        assert_eq!(error, BusError::Timeout { action: "call", limit: SHORT });
    }
}

pub(crate) async fn a_late_reply_disturbs_nobody(scene: &Scene<impl World>) {
    let (caller, server, mut consumer) = pair(scene).await;
    call(scene, &caller, numbered(1), SHORT).await.unwrap_err();
    let late = next(&mut consumer).await;
    let serve = async {
        let request = next(&mut consumer).await;
        server.reply(&late, reply("late")).await.unwrap();
        server.reply(&request, reply("in time")).await.unwrap();
        server.reply(&request, reply("twice")).await.unwrap();
    };
    let (answer, ()) = tokio::join!(call(scene, &caller, numbered(2), LONG), serve);
    assert_eq!(answer.unwrap().body.as_ref(), b"in time");
    caller.close().await;
    server.reply(&late, reply("to nobody")).await.unwrap();
}

pub(crate) async fn a_message_that_is_no_call_cannot_be_answered(scene: &Scene<impl World>) {
    let (bus, queue) = scene.with_queue(scene.queue("q")).await;
    scene.send(&bus, &queue, 1).await;
    let delivery = next(&mut bus.consume(&queue, prefetch(1)).await.unwrap()).await;
    assert_eq!(bus.reply(&delivery, reply("?")).await.unwrap_err(), BusError::NoReplyTo);
    delivery.ack().await.unwrap();
}
