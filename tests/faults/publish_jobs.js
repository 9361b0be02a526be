"use strict";
// Publishes jobs to a backend until RabbitMQ has confirmed each, over as many connections as that takes. Then prints how many tries it took.
const amqp = require("amqplib");

const { MQSERVE_BROKER_URL: url, MQSERVE_NAMESPACE: namespace, BACKEND: backend, FIRST, COUNT, EVERY, AT } = process.env;
const IN_FLIGHT = 256;
const waiting = new Set(Array.from({ length: Number(COUNT) }, (_, place) => Number(FIRST) + place));
let tries = 0;

// The header `mq` with a deadline: {"deadline": ms} in MessagePack.
function beginningWithin(ms) {
  const header = Buffer.alloc(19);
  header.write("\x81\xa8deadline\xcf", "latin1");
  header.writeBigUInt64BE(BigInt(Date.now() + ms), 11);
  return { mq: header };
}

function publish(channel, number) {
  tries += 1;
  return new Promise((resolve, reject) => {
    channel.publish(
      `${namespace}.jobs`,
      backend,
      Buffer.from(JSON.stringify({ number })),
      {
        contentType: "application/json",
        messageId: `node-${number}`,
        persistent: true,
        priority: 2,
        mandatory: true,
        headers: number % Number(EVERY) === Number(AT) ? beginningWithin(1) : {},
      },
      (error) => (error ? reject(error) : resolve()),
    );
  });
}

async function publishOver(connection) {
  const channel = await connection.createConfirmChannel();
  const gone = new Promise((_, reject) => {
    for (const emitter of [connection, channel]) {
      emitter.on("error", reject);
      emitter.on("close", () => reject(new Error("closed")));
    }
    channel.on("return", ({ properties }) => reject(new Error(`${properties.messageId} was returned`)));
  });
  while (waiting.size) {
    const some = [...waiting].slice(0, IN_FLIGHT);
    await Promise.race([gone, Promise.all(some.map((number) => publish(channel, number)))]);
    some.forEach((number) => waiting.delete(number));
  }
  gone.catch(() => {});
  await connection.close();
}

async function main() {
  while (waiting.size) {
    try {
      await publishOver(await amqp.connect(url));
    } catch (error) {
      console.error(String(error));
      await new Promise((resolve) => setTimeout(resolve, 300));
    }
  }
  console.log(tries);
}

main();
